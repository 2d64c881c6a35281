"""Summary statistics of a sample."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qbatch.core.measured.speed_figures import PhaseTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Summary of latencies in seconds. ``stdev`` is the sample standard deviation (n - 1), 0 for a single value."""

    count: int
    mean: float
    stdev: float
    p50: float
    p90: float
    p95: float
    p99: float

    def as_times(self, *, tokens_per_s: float | None = None) -> PhaseTimes:
        """The form in which they are stored."""
        return PhaseTimes(
            count=self.count,
            mean=self.mean,
            stdev=self.stdev,
            p50=self.p50,
            p90=self.p90,
            p95=self.p95,
            p99=self.p99,
            tokens_per_s=tokens_per_s,
        )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The ``percent``-th percentile of an ascending, non-empty sample, interpolated linearly (NumPy's default)."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarize(sample: Sequence[float]) -> Stats:
    """Count, mean, sample standard deviation (0 for one value) and percentiles of a non-empty sample."""
    ordered = sorted(sample)
    return Stats(
        count=len(ordered),
        mean=statistics.fmean(ordered),
        stdev=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation of two samples of one length: Pearson's correlation of their ranks. NaN if all values
    of one sample are equal, if any is NaN, or if there are fewer than two."""
    if any(map(math.isnan, (*first, *second))):
        return math.nan
    ranks = _ranks(first), _ranks(second)
    if len(first) < 2 or any(min(each) == max(each) for each in ranks):
        return math.nan
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    """Ascending ranks from 1; equal values share their mean rank."""
    counts = Counter(values)
    rank_of, below = {}, 0
    for value in sorted(counts):
        rank_of[value] = below + (counts[value] + 1) / 2
        below += counts[value]
    return [rank_of[value] for value in values]
