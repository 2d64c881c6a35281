"""Peaks of memory, seen from a thread beside the one that works."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import psutil
import pynvml
import torch

_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes in use on a GPU: by everybody, and by this process. The latter is None where the driver does not say,
    as in a container whose process numbers are not the host's."""

    total_used: int
    process_used: int | None


@dataclass(slots=True, kw_only=True)
class MemoryPeaks:
    """The largest values seen, in bytes; None where there was nothing to see."""

    max_ram: int | None = None
    max_global_vram: int | None = None
    max_process_vram: int | None = None

    def see(self, ram: int, device: DeviceMemory | None) -> None:
        self.max_ram = _larger(self.max_ram, ram)
        if device is not None:
            self.max_global_vram = _larger(self.max_global_vram, device.total_used)
            self.max_process_vram = _larger(self.max_process_vram, device.process_used)


class MemoryWatch:
    """While its context is open, polls resident memory and the GPU's every 20 ms, from a thread of its own.

    Polling costs the working thread a little time, so it is put around the warm-up, which does the same work and
    is not timed. One look is taken at the start and one at the end in any case.
    """

    def __init__(self, look_at_device: Callable[[], DeviceMemory | None] = lambda: None) -> None:
        self.peaks = MemoryPeaks()
        self._look_at_device = look_at_device
        self._process = psutil.Process()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _poll(self) -> None:
        while not self._over.wait(_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        self.peaks.see(self._process.memory_info().rss, self._look_at_device())


@contextmanager
def watching(device: str) -> Iterator[MemoryWatch]:
    """A watch, not yet open, over this process and, for "cuda:N", that GPU; without NVML the GPU's stay None."""
    with nvml_handle(device) as handle:
        yield MemoryWatch(lambda: None if handle is None else _device_memory(handle))


@contextmanager
def nvml_handle(device: str) -> Iterator[Any]:
    """NVML's handle of a CUDA device, found by UUID, since the two count GPUs differently; None where there is none."""
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
    mine = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return DeviceMemory(total_used=used, process_used=mine[0] if mine else None)


def reset_allocator_peaks(device: str) -> None:
    """Begin anew what ``allocator_peaks`` reports."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        # What the allocator keeps of earlier work would count as this one's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorPeaks:
    """In bytes, of torch's allocator; None on a CPU."""

    allocated: int | None = None
    reserved: int | None = None


def allocator_peaks(device: str) -> AllocatorPeaks:
    """What torch's allocator handed out at most since the reset, and what it kept at most, in bytes; None on a CPU."""
    if not device.startswith("cuda"):
        return AllocatorPeaks()
    return AllocatorPeaks(
        allocated=torch.cuda.max_memory_allocated(device), reserved=torch.cuda.max_memory_reserved(device)
    )


def _larger(before: int | None, now: int | None) -> int | None:
    return max((value for value in (before, now) if value is not None), default=None)
