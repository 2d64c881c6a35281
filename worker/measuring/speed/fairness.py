"""Detect what disturbs measurements on a GPU: other processes, throttling, changing clocks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml

from qbatch.worker.measuring.speed.memory import nvml_handle

# NVML's reasons for throttling: power cap, hardware slowdown, thermal slowdown by software or hardware, power brake.
_THROTTLE_REASONS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
_CLOCK_CHANGE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuConditions:
    """What all samples of one measurement showed together. The clocks are the lowest and highest SM clock."""

    foreign_processes: bool
    throttled: bool
    slowest_mhz: int
    fastest_mhz: int


class FairnessMonitor:
    """Samples the state of the GPU of NVML's ``handle`` from time to time during a measurement."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._foreign = False
        self._throttled = False
        self._clocks_mhz: list[int] = []

    def sample(self) -> None:
        """Record the GPU's current state. Call it right after work, since an idle GPU lowers its clocks.

        Takes a millisecond or more, so it must not be called while something is timed.
        """
        try:
            pids = [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)]
            reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
            self._clocks_mhz.append(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM))
        except pynvml.NVMLError:
            return
        # In a container the process ids are the host's; then a single process is assumed to be this one.
        others = len(pids) - (1 if os.getpid() in pids or len(pids) == 1 else 0)
        self._foreign |= others > 0
        self._throttled |= bool(reasons & _THROTTLE_REASONS)

    def conditions(self) -> GpuConditions | None:
        """What all samples showed; None if the driver never answered."""
        if not self._clocks_mhz:
            return None
        return GpuConditions(
            foreign_processes=self._foreign,
            throttled=self._throttled,
            slowest_mhz=min(self._clocks_mhz),
            fastest_mhz=max(self._clocks_mhz),
        )


class NoMonitor:
    """Stands in for the monitor if there is no GPU, or NVML does not list it."""

    def sample(self) -> None:
        return

    def conditions(self) -> None:
        return


@contextmanager
def fairness_monitor(device: str) -> Iterator[FairnessMonitor | NoMonitor]:
    """A monitor of "cuda:N", or one that does nothing for other devices."""
    with nvml_handle(device) as handle:
        yield NoMonitor() if handle is None else FairnessMonitor(handle)


def flags_of(conditions: Sequence[GpuConditions | None]) -> dict[str, bool] | None:
    """Which disturbances occurred in any of several measurements; None if none was monitored.

    Clocks are compared across all of them, since each round may have steady clocks that differ from another's.
    """
    known = [one for one in conditions if one is not None]
    if not known:
        return None
    slowest, fastest = min(one.slowest_mhz for one in known), max(one.fastest_mhz for one in known)
    return {
        "foreign_processes": any(one.foreign_processes for one in known),
        "throttled": any(one.throttled for one in known),
        "clocks_changed": fastest - slowest > _CLOCK_CHANGE * fastest,
    }
