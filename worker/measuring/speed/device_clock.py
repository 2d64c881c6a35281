"""Clocks for timing work on a device: events on CUDA, the host's monotonic clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments cheaply, without waiting for the device, and reads them back later."""

    def mark(self) -> Any:
        """Mark the moment at which the work submitted so far is done."""

    def intervals_s(self, marks: Sequence[Any]) -> list[float]:
        """Seconds between consecutive marks. Waits for the device."""

    def synchronize(self) -> None:
        """Wait until the device has done all submitted work."""


class HostClock:
    """The clock of a CPU, where the work is done when a call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def intervals_s(self, marks: Sequence[float]) -> list[float]:
        return [after - before for before, after in pairwise(marks)]

    def synchronize(self) -> None:
        return


class CudaClock:
    """CUDA events on the current stream. They include both the device's work and its waiting for the host."""

    def __init__(self, device: str) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def intervals_s(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        self.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def clock_of(device: str) -> Clock:
    return CudaClock(device) if device.startswith("cuda") else HostClock()


def repeat(run: Callable[[], None], *, min_iterations: int, min_duration_s: float) -> int:
    """Call ``run`` until both minima are reached. Returns the number of calls."""
    start_s = time.perf_counter()
    count = 0
    while count < min_iterations or time.perf_counter() - start_s < min_duration_s:
        run()
        count += 1
    return count
