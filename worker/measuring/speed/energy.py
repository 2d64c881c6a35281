"""Energy from NVML's counter, which moves every 100 ms: long loops between ticks, idle measured and taken off."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pynvml

from qbatch.core.measured.decode_figures import MeasuredEnergy, PhaseEnergy
from qbatch.worker.measuring.speed.fairness import FairnessWatch, flags_of

_LOOP_S = 10.0
_TICK_S = 0.1
_NO_TICK_S = 2.0
_LOOK_S = 1.0


class NoEnergyCounter(Exception):
    """The device has no counter, or it does not move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergySpan:
    """Joules that the counter moved between two of its ticks, and the work done in between."""

    joules: float
    seconds: float
    count: int

    @property
    def watts(self) -> float:
        return self.joules / self.seconds

    @property
    def uncertainty_j(self) -> float:
        """A tick more or less at the end: the counter is read just after it moved, to within one poll."""
        return self.watts * _TICK_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Joules for each repetition of some work: ``gross`` as the counter has it, ``net`` less what idling with the
    model loaded takes for as long."""

    gross_j: float
    net_j: float
    uncertainty_j: float
    repetitions: int
    seconds: float


def loop_between_ticks(
    work: Callable[[], None],
    read_j: Callable[[], float],
    *,
    min_s: float = _LOOP_S,
    now_s: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> EnergySpan:
    """Repeat ``work`` (which returns when the device is done) from a tick of the counter for at least ``min_s``, and
    wait for the next tick. Raises NoEnergyCounter where none comes."""
    begin_j, begin_s = _next_tick(read_j, now_s, sleep)
    count = 0
    while now_s() - begin_s < min_s:
        work()
        count += 1
    end_j, end_s = _next_tick(read_j, now_s, sleep)
    return EnergySpan(joules=end_j - begin_j, seconds=end_s - begin_s, count=count)


def net_energy(span: EnergySpan, idle: EnergySpan) -> Energy:
    """Energy of each repetition in ``span``, with what ``idle`` drew taken off for the same time."""
    net_j = span.joules - idle.watts * span.seconds
    idle_error_j = idle.uncertainty_j * span.seconds / idle.seconds
    return Energy(
        gross_j=span.joules / span.count,
        net_j=net_j / span.count,
        uncertainty_j=math.hypot(span.uncertainty_j, idle_error_j) / span.count,
        repetitions=span.count,
        seconds=span.seconds,
    )


def measure_energy(
    handle: Any, *, prefill: Callable[[], None], generate: Callable[[], None], tokens: int, decoded: int
) -> MeasuredEnergy:
    """Energy of the prefill, of decoding, and of idling, on the GPU of NVML's ``handle``; takes about 35 s.

    ``generate`` is the prefill and all decode steps; the prefill's energy is taken off it. ``tokens`` prompt tokens
    are read and ``decoded`` tokens decoded by one call, the whole batch counted. Raises NoEnergyCounter.
    """
    watch = FairnessWatch(handle)
    read_j = partial(_counter_j, handle)
    idle = loop_between_ticks(lambda: time.sleep(0.1), read_j)
    prefill_j = net_energy(loop_between_ticks(_watched(prefill, watch), read_j), idle)
    whole_j = net_energy(loop_between_ticks(_watched(generate, watch), read_j), idle)
    return MeasuredEnergy(
        idle_w=idle.watts,
        prefill=PhaseEnergy(
            gross_j=prefill_j.gross_j,
            net_j=prefill_j.net_j,
            uncertainty_j=prefill_j.uncertainty_j,
            repetitions=prefill_j.repetitions,
            seconds=prefill_j.seconds,
            net_j_per_token=prefill_j.net_j / tokens,
        ),
        decode=PhaseEnergy(
            gross_j=whole_j.gross_j - prefill_j.gross_j,
            net_j=whole_j.net_j - prefill_j.net_j,
            uncertainty_j=math.hypot(whole_j.uncertainty_j, prefill_j.uncertainty_j),
            gross_j_per_token=(whole_j.gross_j - prefill_j.gross_j) / decoded,
            net_j_per_token=(whole_j.net_j - prefill_j.net_j) / decoded,
        ),
        flags=flags_of([watch.sighting()]),
    )


def _watched(work: Callable[[], None], watch: FairnessWatch) -> Callable[[], None]:
    """``work`` with a look once a second: more of them would be measured too."""
    looked_s = time.perf_counter()

    def run() -> None:
        nonlocal looked_s
        work()
        if time.perf_counter() - looked_s >= _LOOK_S:
            watch.look()
            looked_s = time.perf_counter()

    return run


def _counter_j(handle: Any) -> float:
    try:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except pynvml.NVMLError as error:
        raise NoEnergyCounter(str(error)) from error


def _next_tick(
    read_j: Callable[[], float], now_s: Callable[[], float], sleep: Callable[[float], None]
) -> tuple[float, float]:
    """(joules, seconds) just after the counter has moved."""
    before_j, begin_s = read_j(), now_s()
    while (value_j := read_j()) == before_j:
        if now_s() - begin_s > _NO_TICK_S:
            raise NoEnergyCounter(f"the energy counter did not move for {_NO_TICK_S:.0f} s")
        sleep(0.001)
    return value_j, now_s()
