"""Measure peaks of memory, by polling from a separate thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pynvml
import torch

_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes in use on a GPU: by all processes, and by this one.

    The latter is None if the driver does not tell, as in a container whose process ids differ from the host's.
    """

    total_used: int
    process_used: int | None


@dataclass(slots=True, kw_only=True)
class MemoryPeaks:
    """The largest recorded values in bytes; None if there were none."""

    max_ram: int | None = None
    max_global_vram: int | None = None
    max_process_vram: int | None = None

    def record(self, ram: int, device: DeviceMemory | None) -> None:
        self.max_ram = _larger(self.max_ram, ram)
        if device is not None:
            self.max_global_vram = _larger(self.max_global_vram, device.total_used)
            self.max_process_vram = _larger(self.max_process_vram, device.process_used)


class MemoryMonitor:
    """A context manager that polls resident memory and GPU memory every 20 ms from a separate thread.

    Polling slows the working thread a little, so it is used during the warm-up, which runs the same kernels untimed.
    Memory is also sampled once at the start and once at the end.
    """

    def __init__(self, read_device_memory: Callable[[], DeviceMemory | None] = lambda: None) -> None:
        self.peaks = MemoryPeaks()
        self._read_device_memory = read_device_memory
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="memory-monitor", daemon=True)

    def __enter__(self) -> Self:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def record_end(self, resident_peak: int | None) -> None:
        """Sample once more after all work. ``resident_peak``: the kernel's own peak for it, if known."""
        self.peaks.record(max(self._process.memory_info().rss, resident_peak or 0), self._read_device_memory())

    def _poll(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        self.peaks.record(self._process.memory_info().rss, self._read_device_memory())


@contextmanager
def memory_monitor(device: str) -> Iterator[MemoryMonitor]:
    """A monitor, not yet started, of this process and, for "cuda:N", that GPU (whose peaks are None without NVML).

    Its peaks are those of everything within this context, whether or not it was started meanwhile: torch does not
    return a GPU's memory before the end, and Linux keeps the peak of resident memory.
    """
    with nvml_handle(device) as handle:
        monitor = MemoryMonitor(lambda: None if handle is None else _device_memory(handle))
        is_reset = _reset_resident_peak()
        yield monitor
        monitor.record_end(_resident_peak() if is_reset else None)


def _reset_resident_peak() -> bool:
    """Reset the kernel's peak of resident memory, and return whether it could be: some sandboxes forbid it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    """The largest resident memory in bytes since the reset; None where the kernel does not tell."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


@contextmanager
def nvml_handle(device: str) -> Iterator[Any]:
    """NVML's handle of a CUDA device, found by UUID since NVML numbers GPUs differently; None if there is none."""
    if not device.startswith("cuda"):
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield _handle(device)
    finally:
        pynvml.nvmlShutdown()


def _handle(device: str) -> Any:
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except pynvml.NVMLError:
        return None


def _device_memory(handle: Any) -> DeviceMemory | None:
    try:
        used = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return DeviceMemory(total_used=used, process_used=own[0] if own else None)


def reset_allocator_peaks(device: str) -> None:
    """Reset the peaks that ``allocator_peaks`` reports."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        # Memory that the allocator keeps from earlier work would count as well.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorPeaks:
    """Peaks of torch's allocator in bytes; None on a CPU."""

    allocated: int | None = None
    reserved: int | None = None


def allocator_peaks(device: str) -> AllocatorPeaks:
    """The most bytes that torch's allocator had handed out, and had reserved, since the reset."""
    if not device.startswith("cuda"):
        return AllocatorPeaks()
    return AllocatorPeaks(
        allocated=torch.cuda.max_memory_allocated(device), reserved=torch.cuda.max_memory_reserved(device)
    )


def _larger(before: int | None, now: int | None) -> int | None:
    return max((value for value in (before, now) if value is not None), default=None)
