"""What changed of a configuration that was measured twice, and whether that is more than the measured noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from qbatch.core.measured.metric import Better, Metric, TimingNoise
from qbatch.core.measured.metrics import (
    DECODE,
    DISK,
    FORWARD,
    KL_MEAN,
    PERPLEXITY,
    PREFILL,
    RANK_CORRELATION,
    THROUGHPUT,
    WEIGHTS,
)
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.metric_text import show_metric
from qbatch.views.noise import is_about_equal
from qbatch.views.quality_bounds import QUALITY_COSTS, QualityCost, is_same_cost
from qbatch.views.speed_difference import speed_difference

_SPEEDS = (DECODE, THROUGHPUT, PREFILL, FORWARD)
_SIZES = (WEIGHTS, DISK)
_NAMES = {KL_MEAN.key: "KL", PERPLEXITY.key: "perplexity ratio", RANK_CORRELATION.key: "lost rank corr"}


class Change(StrEnum):
    """How the later of two figures compares with the earlier. NOISE: no more than the measured noise explains.
    UNCERTAIN: the rounds confirm no difference, but it is too large to be called none. UNKNOWN: they differ, and
    nothing tells how large the noise is."""

    FASTER = "faster"
    SLOWER = "slower"
    BETTER = "better"
    WORSE = "worse"
    SMALLER = "smaller"
    LARGER = "larger"
    UNCERTAIN = "uncertain"
    UNKNOWN = "noise unknown"
    NOISE = "within noise"


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureChange:
    """One figure, before and after, as a number and as text. ``is_ratio``: it is itself one to the baseline, and the
    ratio of the two would say little."""

    key: str
    label: str
    before: float
    after: float
    before_text: str
    after_text: str
    change: Change
    is_ratio: bool = False

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if self.before else None


def figure_changes(before: ResultRow, after: ResultRow) -> list[FigureChange]:
    """The figures that both rows have. Both must be of one protocol, device and model content."""
    changes = [*_speeds(before, after), *_qualities(before, after), *_sizes(before, after)]
    return [change for change in changes if math.isfinite(change.before) and math.isfinite(change.after)]


def _of_metric(metric: Metric, before: ResultRow, after: ResultRow, change: Change) -> Iterable[FigureChange]:
    first, second = metric.value(before), metric.value(after)
    if first is not None and second is not None:
        yield FigureChange(
            key=metric.key,
            label=metric.label,
            before=first,
            after=second,
            before_text=show_metric(metric, before),
            after_text=show_metric(metric, after),
            change=change,
        )


def _speeds(before: ResultRow, after: ResultRow) -> Iterable[FigureChange]:
    for metric in _SPEEDS:
        yield from _of_metric(metric, before, after, _speed_change(metric, before, after))


def _speed_change(metric: Metric, before: ResultRow, after: ResultRow) -> Change:
    first, second = metric.value(before), metric.value(after)
    if not isinstance(metric.noise, TimingNoise) or not first or not second or first == second:
        return Change.NOISE
    difference = speed_difference(metric.noise, after, before, math.log(second) - math.log(first))
    if difference is None:
        return Change.UNKNOWN
    if not difference.is_real:
        return Change.NOISE if is_about_equal(metric, after, before) else Change.UNCERTAIN
    is_faster = (second > first) == (metric.better is Better.HIGHER)
    return Change.FASTER if is_faster else Change.SLOWER


def _qualities(before: ResultRow, after: ResultRow) -> Iterable[FigureChange]:
    for cost in QUALITY_COSTS:
        first, second = cost.value(before), cost.value(after)
        if first is not None and second is not None:
            yield FigureChange(
                key=cost.metric.key,
                label=_NAMES[cost.metric.key],
                before=first,
                after=second,
                before_text=cost.show(first),
                after_text=cost.show(second),
                change=_quality_change(cost, before, after, first, second),
                is_ratio=cost.metric is PERPLEXITY,
            )


def _quality_change(cost: QualityCost, before: ResultRow, after: ResultRow, first: float, second: float) -> Change:
    if is_same_cost(cost, before, after):
        return Change.NOISE
    if cost.error(before) is None or cost.error(after) is None:
        return Change.UNKNOWN
    return Change.BETTER if second < first else Change.WORSE


def _sizes(before: ResultRow, after: ResultRow) -> Iterable[FigureChange]:
    for metric in _SIZES:
        first, second = metric.value(before) or 0, metric.value(after) or 0
        changed = Change.SMALLER if second < first else Change.LARGER
        yield from _of_metric(metric, before, after, Change.NOISE if first == second else changed)
