"""What makes a GPU's figures unfair: other processes on it, throttling, clocks that change."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pynvml

from worker.benchmark.memory import nvml_handle

# Reasons for which a GPU lowers its clocks against its will: power cap, heat, and their brakes.
_THROTTLE_REASONS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
_CLOCK_CHANGE = 0.05

Flags = Mapping[str, bool]


class FairnessWatch:
    """Looks at the GPU of NVML's ``handle`` from time to time while it is measured."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._foreign = False
        self._throttled = False
        self._clocks_mhz: list[int] = []

    def look(self) -> None:
        """Take note of the present state of a GPU that has just worked, since idling lowers the clocks. Takes a
        millisecond or more: not while something is timed."""
        try:
            pids = [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)]
            reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
            self._clocks_mhz.append(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM))
        except pynvml.NVMLError:
            return
        # In a container the numbers are the host's; then one process is taken to be this one.
        others = len(pids) - (1 if os.getpid() in pids or len(pids) == 1 else 0)
        self._foreign |= others > 0
        self._throttled |= bool(reasons & _THROTTLE_REASONS)

    def flags(self) -> dict[str, bool] | None:
        """What was seen in all looks; None where the driver never told."""
        if not self._clocks_mhz:
            return None
        slowest, fastest = min(self._clocks_mhz), max(self._clocks_mhz)
        return {
            "foreign_processes": self._foreign,
            "throttled": self._throttled,
            "clocks_changed": fastest - slowest > _CLOCK_CHANGE * fastest,
        }


class NoWatch:
    """Where there is no GPU, or none that NVML shows."""

    def look(self) -> None:
        return

    def flags(self) -> None:
        return


@contextmanager
def fairness_watch(device: str) -> Iterator[FairnessWatch | NoWatch]:
    """A watch over "cuda:N"."""
    with nvml_handle(device) as handle:
        yield NoWatch() if handle is None else FairnessWatch(handle)


def any_of(flags: Sequence[Flags | None]) -> dict[str, bool] | None:
    """What was seen in any of several spans; None where none was watched."""
    seen = [one for one in flags if one is not None]
    return {name: any(one[name] for one in seen) for name in seen[0]} if seen else None
