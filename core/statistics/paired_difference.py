"""The difference between two models on the same questions or windows, and how well it is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from qbatch.core.statistics.clusters import clustered_error

CONFIDENCE = 0.95
# A difference that is the same everywhere scatters by rounding.
_ROUNDING = 1e-12
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """The mean difference over ``units``, its standard error, and its interval of 95 %: ``low`` to ``high``. Where the
    error cannot be estimated, they are None: from one cluster, or from several that all have the same mean."""

    mean: float
    units: int
    clusters: int
    error: float | None = None
    low: float | None = None
    high: float | None = None


def difference_of_clusters(sums: Sequence[float], counts: Sequence[int]) -> PairedDifference:
    """The mean of differences of which only whole clusters are independent: their sum and number in each cluster.

    The interval is that of Student's t distribution with one degree of freedom less than there are clusters.
    """
    units = sum(counts)
    mean, error = math.fsum(sums) / units, clustered_error(sums, counts)
    # Without any scatter, nothing is known of how much there would be in other clusters.
    if error is None or error <= _ROUNDING * abs(mean):
        return PairedDifference(mean=mean, units=units, clusters=len(sums))
    quantile = student_quantile((1 + CONFIDENCE) / 2, len(sums) - 1)
    return PairedDifference(
        mean=mean,
        units=units,
        clusters=len(sums),
        error=error,
        low=mean - quantile * error,
        high=mean + quantile * error,
    )


def difference_of_proportions(lost: int, gained: int, units: int) -> PairedDifference:
    """The difference of two proportions on the same independent ``units``: ``gained`` by the second model only, less
    ``lost`` by it.

    The interval is Bonett and Price's (2012): Wald's, with one unit more in either of the discordant cells. It keeps
    its coverage where few units differ, and is not empty where none does. The error is the one within it.
    """
    more, less = (gained + 1) / (units + 2), (lost + 1) / (units + 2)
    error = math.sqrt((more + less - (more - less) ** 2) / (units + 2))
    centre = more - less
    return PairedDifference(
        mean=(gained - lost) / units,
        units=units,
        clusters=units,
        error=error,
        low=max(-1.0, centre - _Z * error),
        high=min(1.0, centre + _Z * error),
    )


def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution at a ``probability`` of at least 0.5, found by bisection."""
    if degrees < 1:
        raise ValueError(f"a t distribution has at least one degree of freedom, not {degrees}")
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < probability:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, degrees: int) -> float:
    """P(T ≤ t) for t ≥ 0, by the finite series in the angle atan(t/√ν) (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    is_odd = degrees % 2 == 1
    term = math.cos(angle) if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for number in range(3 if is_odd else 2, degrees - 1, 2):
        term *= square * (number - 1) / number
        total += term
    within = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return (1 + within) / 2
