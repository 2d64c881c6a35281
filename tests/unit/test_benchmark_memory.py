"""Peaks of memory seen while something runs."""

from __future__ import annotations

import gc
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import psutil
import pytest

from qbatch.worker.measuring.speed import memory
from qbatch.worker.measuring.speed.memory import DeviceMemory, MemoryMonitor, MemoryPeaks, memory_monitor
from tests import tiny
from tests.unit.benchmark_models import measured
from tests.waiting import until

MIB = 1 << 20


def test_memory_that_is_freed_again_before_the_end_is_seen() -> None:
    gc.collect()  # what earlier tests left must not go while this one looks
    before = psutil.Process().memory_info().rss
    with MemoryMonitor() as watch:
        block = np.ones(256 * MIB, dtype=np.uint8)
        until(lambda: (watch.peaks.max_ram or 0) >= before + 200 * MIB)
        del block


def test_the_largest_of_the_device_s_values_is_kept() -> None:
    seen = [DeviceMemory(total_used=n, process_used=n - 1) for n in (5, 9, 7)]
    unseen = list(seen)
    with MemoryMonitor(lambda: unseen.pop(0) if unseen else seen[0]) as watch:
        until(lambda: not unseen)
    assert watch.peaks.max_global_vram == 9
    assert watch.peaks.max_process_vram == 8


def test_a_peak_while_nothing_polls_is_seen_too() -> None:
    """A round's timed generation takes more than its short warm-up, and must not be polled."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    with memory_monitor("cpu") as watch:
        with watch:
            pass
        block = np.ones(256 * MIB, dtype=np.uint8)
        del block
    assert (watch.peaks.max_ram or 0) >= before + 200 * MIB


def test_an_earlier_peak_is_not_counted() -> None:
    block = np.ones(512 * MIB, dtype=np.uint8)
    del block
    before = psutil.Process().memory_info().rss
    with memory_monitor("cpu") as watch, watch:
        pass
    assert (watch.peaks.max_ram or 0) < before + 200 * MIB


def test_device_memory_at_the_end_counts_though_nothing_polled_then(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [3, 3, 8]
    monkeypatch.setattr(memory, "nvml_handle", lambda _device: nullcontext("handle"))
    monkeypatch.setattr(memory, "_INTERVAL_S", 60.0)
    monkeypatch.setattr(
        memory, "_device_memory", lambda _handle: DeviceMemory(total_used=used.pop(0), process_used=None)
    )
    with memory_monitor("cuda:0") as watch, watch:
        pass
    assert watch.peaks.max_global_vram == 8


def test_where_the_kernel_keeps_no_peak_the_samples_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_resident_peak", lambda: False)
    with memory_monitor("cpu") as watch, watch:
        pass
    assert (watch.peaks.max_ram or 0) > MIB


def test_what_the_driver_does_not_say_stays_unknown() -> None:
    peaks = MemoryPeaks()
    peaks.record(3, None)
    peaks.record(2, DeviceMemory(total_used=4, process_used=None))
    assert (peaks.max_ram, peaks.max_global_vram, peaks.max_process_vram) == (3, 4, None)


def test_the_thread_ends_with_the_context_even_after_an_error() -> None:
    with pytest.raises(ValueError, match="broken"), MemoryMonitor():
        raise ValueError("broken")
    assert "memory-monitor" not in {thread.name for thread in threading.enumerate()}


def test_a_cpu_benchmark_has_resident_memory_and_no_gpu_figures(tmp_path: Path) -> None:
    memory = measured(tiny.make_causal(tmp_path)).details.to_json()["memory"]
    assert memory["max_ram"] > 50 * MIB
    assert {name for name, value in memory.items() if value is None} == {
        "max_global_vram",
        "max_process_vram",
        "max_allocated",
        "max_reserved",
    }
