"""A sample of numbers in a few."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from models_db.domain import Stats


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The ``percent``-th percentile of an ascending, non-empty sample, interpolated linearly (NumPy's default)."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


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
