"""How far two rows' speeds lie apart, and whether their rounds confirm it.

Rounds are the independent samples: a host that is slow during a round is slow for all of its steps. Rows that took
turns in the same rounds shared what slowed each, so they are compared round by round; others by Welch's test.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from qbatch.core.measured.metric import TimingNoise
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.groups import timed_job

# Student's t for a two-sided test at 4 %, by degrees of freedom: of equal rows, fewer than 5 % should appear different.
_STUDENT_T = {
    1: 15.895,
    2: 4.849,
    3: 3.482,
    4: 2.999,
    5: 2.757,
    6: 2.612,
    7: 2.517,
    8: 2.449,
    9: 2.398,
    10: 2.359,
    12: 2.303,
    15: 2.249,
    20: 2.197,
    30: 2.147,
    60: 2.099,
    120: 2.076,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedDifference:
    """The logarithm of the ratio of two rows' times, its standard error, and the degrees of freedom of that error."""

    ln_ratio: float
    error: float
    freedom: float

    @property
    def is_real(self) -> bool:
        return abs(self.ln_ratio) > student_t(self.freedom) * self.error

    @classmethod
    def paired(cls, first: Sequence[float], second: Sequence[float]) -> Self:
        """From two rows' times in the same rounds, at least two."""
        ratios = [math.log(one) - math.log(other) for one, other in zip(first, second, strict=True)]
        error = statistics.stdev(ratios) / math.sqrt(len(ratios))
        return cls(ln_ratio=statistics.fmean(ratios), error=error, freedom=len(ratios) - 1)

    @classmethod
    def between(cls, first: Sample, second: Sample, ln_ratio: float) -> Self:
        """From samples of different visits, with the degrees of freedom of Welch and Satterthwaite."""
        variance = first.error**2 + second.error**2
        weights = sum(sample.error**4 / (sample.count - 1) for sample in (first, second))
        # Without any scatter every difference is real, whatever the degrees of freedom.
        freedom = variance**2 / weights if weights else 1.0
        return cls(ln_ratio=ln_ratio, error=math.sqrt(variance), freedom=freedom)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """``error``: the relative standard error of the mean of ``count`` times."""

    error: float
    count: int


def student_t(freedom: float) -> float:
    """The quantile for at most ``freedom`` degrees of freedom, of those known."""
    return _STUDENT_T[max((known for known in _STUDENT_T if known <= freedom), default=1)]


def speed_difference(
    times: TimingNoise, first: ResultRow, second: ResultRow, ln_ratio: float
) -> SpeedDifference | None:
    """The difference of two rows in ``times``; None if either has too few times to tell.

    ``ln_ratio`` is that of their values, and used for rows that were not timed in the same rounds.
    """
    rounds = _rounds(times, first), _rounds(times, second)
    if _in_the_same_rounds(first, second) and len(rounds[0]) == len(rounds[1]) > 1:
        return SpeedDifference.paired(*rounds)
    samples = _sample(times, first, rounds[0]), _sample(times, second, rounds[1])
    if samples[0] is None or samples[1] is None:
        return None
    return SpeedDifference.between(samples[0], samples[1], ln_ratio)


def _rounds(times: TimingNoise, row: ResultRow) -> Sequence[float]:
    """The row's times by round; none if what is stored cannot be times."""
    by_round = row.details.by_round(times.phase)
    rounds = (by_round.p50 if times.of == "median" else by_round.mean) or ()
    return rounds if all(one > 0 for one in rounds) else ()


def _in_the_same_rounds(first: ResultRow, second: ResultRow) -> bool:
    """Whether each names the other: after a retry, a row's first rounds are not those of the others."""
    return all(
        timed_job(one) in (other.details.rounds.interleaved_with or ())
        for one, other in ((first, second), (second, first))
    )


def _sample(times: TimingNoise, row: ResultRow, rounds: Sequence[float]) -> Sample | None:
    """The row's rounds, or its calls if it had only one round, as early versions did."""
    if len(rounds) > 1:
        error = statistics.stdev(rounds) / statistics.fmean(rounds) / math.sqrt(len(rounds))
        return Sample(error=error, count=len(rounds))
    calls = row.details.times(times.phase)
    if not calls.count or calls.count < 2 or not calls.mean or calls.stdev is None:
        return None
    return Sample(error=calls.stdev / calls.mean / math.sqrt(calls.count), count=calls.count)
