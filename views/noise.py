"""Which differences are noise: of quality, those below their standard error, or no larger than 16-bit arithmetic alone
causes; of speed, those that the rounds do not confirm. Where the error is unknown, only equal values count as noise.
"""

from __future__ import annotations

import math
from typing import assert_never

from qbatch.core.measured.metric import ComparisonNoise, FloorNoise, Metric, TimingNoise
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.speed_figures import NOTABLE_SPREAD
from qbatch.views.speed_difference import speed_difference

NOT_DISTINGUISHABLE = "not distinguishable"
NOISE_MARK = "≈"
UNSTEADY_MARK = "?"
"""Beside a speed that differed much between the rounds, or a difference that is too large to be called none."""
# A ratio beyond this, of which the rounds say nothing, is unknown and not about equal.
_ABOUT_EQUAL = 1.1


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


def noise_mark(metric: Metric, row: ResultRow, baseline: ResultRow | None) -> str:
    """The mark beside a figure whose difference from the baseline's is noise; "" if it is not."""
    if not is_noise(metric, row, baseline):
        return ""
    return NOISE_MARK if is_about_equal(metric, row, baseline) else UNSTEADY_MARK


def is_about_equal(metric: Metric, row: ResultRow, baseline: ResultRow | None) -> bool:
    """Whether a difference that is noise is small too. One of speed may be large, where the host was busy."""
    if not isinstance(metric.noise, TimingNoise) or baseline is None:
        return True
    value, other = metric.value(row), metric.value(baseline)
    return not value or not other or max(value / other, other / value) <= _ABOUT_EQUAL


def is_unsteady(metric: Metric, row: ResultRow) -> bool:
    """Whether ``row``'s value is of a phase whose speed differed much between the rounds."""
    if not isinstance(metric.noise, TimingNoise) or not row.details.audits.spread_between_rounds:
        return False
    spread = row.details.by_round(metric.noise.phase).spread
    return spread is None or spread > NOTABLE_SPREAD


def same_speed(metric: Metric, first: ResultRow, second: ResultRow) -> bool:
    """Whether two rows' times or rates differ by no more than their rounds explain."""
    one, other = metric.value(first), metric.value(second)
    if one is None or other is None or not isinstance(metric.noise, TimingNoise):
        return False
    if one <= 0 or other <= 0:
        return one == other
    difference = speed_difference(metric.noise, first, second, math.log(one) - math.log(other))
    return one == other if difference is None else not difference.is_real
