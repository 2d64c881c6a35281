"""Measure energy with NVML's counter, which ticks every 100 ms: in long loops between ticks, less idle energy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pynvml

from qbatch.core.measured.decode_figures import MeasuredEnergy, PhaseEnergy
from qbatch.worker.measuring.speed.fairness import FairnessMonitor, flags_of

_LOOP_S = 10.0
_TICK_S = 0.1
_NO_TICK_S = 2.0
_SAMPLE_INTERVAL_S = 1.0


class NoEnergyCounter(Exception):
    """The device has no energy counter, or the counter does not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergySpan:
    """Joules between two ticks of the counter, and how often the work was done in between."""

    joules: float
    seconds: float
    count: int

    @property
    def watts(self) -> float:
        return self.joules / self.seconds

    @property
    def uncertainty_j(self) -> float:
        """The energy of one tick at the mean power, by which the end of the span may be off."""
        return self.watts * _TICK_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Joules per repetition of some work: ``gross_j`` by the counter, ``net_j`` less the idle energy for the same time.

    Idle is measured with the model loaded. ``seconds``: the time of all repetitions.
    """

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
    """Repeat ``work`` from a tick of the counter for at least ``min_s``, then wait for the next tick.

    ``work`` must return only when the device is done. Raises NoEnergyCounter if no tick comes.
    """
    begin_j, begin_s = _next_tick(read_j, now_s, sleep)
    count = 0
    while now_s() - begin_s < min_s:
        work()
        count += 1
    end_j, end_s = _next_tick(read_j, now_s, sleep)
    return EnergySpan(joules=end_j - begin_j, seconds=end_s - begin_s, count=count)


def net_energy(span: EnergySpan, idle: EnergySpan) -> Energy:
    """Energy per repetition in ``span``; for the net energy, idle energy for the same time is subtracted."""
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
    """Measure the energy of prefill, decoding and idling on the GPU of NVML's ``handle``. Takes about 35 s.

    ``generate`` does the prefill and all decode steps; the energy of decoding is the difference. One call reads
    ``tokens`` prompt tokens and decodes ``decoded`` tokens, counted over the whole batch. Raises NoEnergyCounter.
    """
    monitor = FairnessMonitor(handle)
    read_j = partial(_counter_j, handle)
    idle = loop_between_ticks(lambda: time.sleep(0.1), read_j)
    prefill_j = net_energy(loop_between_ticks(_monitored(prefill, monitor), read_j), idle)
    whole_j = net_energy(loop_between_ticks(_monitored(generate, monitor), read_j), idle)
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
        flags=flags_of([monitor.conditions()]),
    )


def _monitored(work: Callable[[], None], monitor: FairnessMonitor) -> Callable[[], None]:
    """``work``, with a sample of the GPU's state once a second. More samples would distort the measurement."""
    sampled_s = time.perf_counter()

    def run() -> None:
        nonlocal sampled_s
        work()
        if time.perf_counter() - sampled_s >= _SAMPLE_INTERVAL_S:
            monitor.sample()
            sampled_s = time.perf_counter()

    return run


def _counter_j(handle: Any) -> float:
    try:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except pynvml.NVMLError as error:
        raise NoEnergyCounter(str(error)) from error


def _next_tick(
    read_j: Callable[[], float], now_s: Callable[[], float], sleep: Callable[[float], None]
) -> tuple[float, float]:
    """Wait for the counter to change. Returns (joules, seconds) just after that. Raises NoEnergyCounter."""
    before_j, begin_s = read_j(), now_s()
    while (value_j := read_j()) == before_j:
        if now_s() - begin_s > _NO_TICK_S:
            raise NoEnergyCounter(f"the energy counter did not change for {_NO_TICK_S:.0f} s")
        sleep(0.001)
    return value_j, now_s()
