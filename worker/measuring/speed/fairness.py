"""What makes a GPU's figures unfair: other processes on it, throttling, clocks that change."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml

from qbatch.worker.measuring.speed.memory import nvml_handle

# Reasons for which a GPU lowers its clocks against its will: power cap, heat, and their brakes.
_THROTTLE_REASONS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
_CLOCK_CHANGE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What the looks of one span saw together. The clocks are the SM's, the lowest and the highest."""

    foreign_processes: bool
    throttled: bool
    slowest_mhz: int
    fastest_mhz: int


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

    def sighting(self) -> Sighting | None:
        """What was seen in all looks; None where the driver never told."""
        if not self._clocks_mhz:
            return None
        return Sighting(
            foreign_processes=self._foreign,
            throttled=self._throttled,
            slowest_mhz=min(self._clocks_mhz),
            fastest_mhz=max(self._clocks_mhz),
        )


class NoWatch:
    """Where there is no GPU, or none that NVML shows."""

    def look(self) -> None:
        return

    def sighting(self) -> None:
        return


@contextmanager
def fairness_watch(device: str) -> Iterator[FairnessWatch | NoWatch]:
    """A watch over "cuda:N"."""
    with nvml_handle(device) as handle:
        yield NoWatch() if handle is None else FairnessWatch(handle)


def flags_of(sightings: Sequence[Sighting | None]) -> dict[str, bool] | None:
    """What makes several spans unfair together; None where none was watched.

    The clocks of all are compared: a slow round beside a fast one has steady clocks in itself.
    """
    seen = [one for one in sightings if one is not None]
    if not seen:
        return None
    slowest, fastest = min(one.slowest_mhz for one in seen), max(one.fastest_mhz for one in seen)
    return {
        "foreign_processes": any(one.foreign_processes for one in seen),
        "throttled": any(one.throttled for one in seen),
        "clocks_changed": fastest - slowest > _CLOCK_CHANGE * fastest,
    }
