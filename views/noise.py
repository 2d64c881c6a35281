"""Which differences are noise: those below their standard error, or no larger than 16-bit arithmetic alone causes.

The standard error is that of the difference, taken once. Where it is unknown, only equal values count as noise.
"""

from __future__ import annotations

import math
import statistics
from typing import assert_never

from qbatch.core.measured.metrics import ComparisonNoise, FloorNoise, Metric, TimingNoise
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.speed_figures import Phase

NOT_DISTINGUISHABLE = "not distinguishable"
NOISE_MARK = "≈"


def is_noise(metric: Metric, row: ResultRow, baseline: ResultRow | None = None) -> bool:
    """Whether ``row``'s value cannot be distinguished from its baseline's.

    Quality is judged by the row's own comparison with its base. Speed needs ``baseline``.
    """
    match metric.noise:
        case None:
            return False
        case ComparisonNoise(distance=distance, error=error, floor=floor):
            return _is_under(distance(row), error(row), floor(row))
        case FloorNoise(floor=floor):
            value, least = metric.value(row), floor(row)
            return value is not None and (value == 1 or (least is not None and value >= least))
        case TimingNoise():
            return baseline is not None and same_speed(metric, row, baseline)
        case _:
            assert_never(metric.noise)


def _is_under(difference: float | None, error: float | None, floor: float | None) -> bool:
    if difference is None:
        return False
    # Equal values do not differ, whether or not the error is known.
    return difference == 0 or abs(difference) < (error or 0.0) or abs(difference) <= abs(floor or 0.0)


def same_speed(metric: Metric, first: ResultRow, second: ResultRow) -> bool:
    """Whether two rows' times or rates differ by less than the standard error of the difference.

    A median is assigned the standard error of the mean.
    """
    one, other = metric.value(first), metric.value(second)
    if one is None or other is None or not isinstance(metric.noise, TimingNoise):
        return False
    phase = metric.noise.phase
    errors = relative_error(first, phase), relative_error(second, phase)
    if errors[0] is None or errors[1] is None:
        return one == other
    return abs(one - other) < math.hypot(one * errors[0], other * errors[1])


def relative_error(row: ResultRow, phase: Phase) -> float | None:
    """The standard error of a phase's mean, divided by the mean; None for fewer than two values.

    It is the larger of two: from all times, and from the means of the rounds.
    """
    times = row.details.times(phase)
    if not times.count or times.count < 2 or not times.mean or times.stdev is None:
        return None
    return max(float(times.stdev / times.mean / math.sqrt(times.count)), _between_rounds(row, phase))


def _between_rounds(row: ResultRow, phase: Phase) -> float:
    """The relative standard error from the rounds' means; 0 for one round.

    The times of one round are not independent: a host that is slow during a round is slow for all of them.
    """
    means = row.details.by_round(phase).mean or ()
    if len(means) < 2:
        return 0.0
    return float(statistics.stdev(means) / statistics.fmean(means) / math.sqrt(len(means)))
