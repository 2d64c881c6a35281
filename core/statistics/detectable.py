"""How large a difference a comparison could have shown: what a test that shows none leaves open."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable
from statistics import NormalDist

from qbatch.core.statistics.no_difference import mcnemar, smallest_sign_flip_p
from qbatch.core.statistics.paired_difference import student_quantile

POWER = 0.8
_NORMAL = NormalDist()
# Up to so many questions that change, the power is counted; beyond, a normal distribution is near enough.
_COUNTED = 150
# What lies beyond so many standard deviations is left out: less than one in a billion.
_DEVIATIONS = 6.5
_HALVINGS = 20


def detectable_proportion(lost: int, gained: int, units: int, *, significance: float) -> float | None:
    """The smallest true difference of two proportions that McNemar's exact test on ``units`` would have shown at
    ``significance`` with a probability of 80 %, where as many units change in the other direction as in the rarer
    direction of ``lost`` and ``gained``. None if no difference would have been.
    """
    against = min(lost, gained) / units
    largest = 1 - 2 * against

    def is_enough(difference: float) -> bool:
        return _mcnemar_power(difference, against, units, significance) >= POWER

    return _least(is_enough, largest) if largest > 0 and is_enough(largest) else None


def detectable_mean(error: float | None, clusters: int, *, significance: float) -> float | None:
    """The smallest true mean difference that the sign-flip test of independent ``clusters`` would have shown at
    ``significance`` with a probability of 80 %, by Student's t. ``error``: the standard error of the mean. None if it
    is not known, or if no difference would have been.
    """
    if error is None or smallest_sign_flip_p(clusters) > significance:
        return None
    return (student_quantile(1 - significance / 2, clusters - 1) + _NORMAL.inv_cdf(POWER)) * error


def _least(is_enough: Callable[[float], bool], largest: float) -> float:
    low, high = 0.0, largest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _mcnemar_power(difference: float, against: float, units: int, significance: float) -> float:
    """The probability of a p-value of at most ``significance``, if a share ``against + difference`` of the units
    changes in one direction, and ``against`` in the other."""
    changing = min(1.0, difference + 2 * against)
    mean, variance = units * changing, units * changing * (1 - changing)
    if mean > _COUNTED:
        deviation = math.sqrt(units * (changing - difference**2))
        # One less: the exact test counts whole units.
        excess = units * difference - 1 - _NORMAL.inv_cdf(1 - significance / 2) * math.sqrt(mean)
        return _NORMAL.cdf(excess / deviation) if deviation > 0 else float(excess > 0)
    reach = _DEVIATIONS * math.sqrt(variance) + 1
    share = (against + difference) / changing if changing else 0.5
    return math.fsum(
        _binomial(count, units, changing) * _shown(count, share, significance)
        for count in range(max(0, math.floor(mean - reach)), min(units, math.ceil(mean + reach)) + 1)
    )


def _shown(count: int, share: float, significance: float) -> float:
    """The probability of a significant test if ``count`` units change, each in the one direction with ``share``."""
    least = _critical(count, significance)
    if least is None:
        return 0.0
    return math.fsum(_binomial(each, count, share) for each in range(least, count + 1))


@functools.lru_cache(maxsize=4096)
def _critical(count: int, significance: float) -> int | None:
    """Of ``count`` units that change, how many in one direction are significant; None if not even all are."""
    more_than_half = range(count // 2 + 1, count + 1)
    place = bisect_left(more_than_half, True, key=lambda each: mcnemar(each, count - each) <= significance)
    return more_than_half[place] if place < len(more_than_half) else None


def _binomial(successes: int, trials: int, probability: float) -> float:
    if probability <= 0 or probability >= 1:
        return float(successes == (trials if probability >= 1 else 0))
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    return math.exp(ways + successes * math.log(probability) + (trials - successes) * math.log1p(-probability))
