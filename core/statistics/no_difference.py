"""Tests of the hypothesis that two models that answered the same questions are equally good."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

# Up to this many clusters all assignments of signs are counted: 65,536.
_ENUMERATED = 16
_DRAWS = 20_000
_SEED = 0
# The signs of this many clusters are drawn at once, from a table of their sums.
_AT_ONCE = 10
# Two sums of the same numbers in another order may differ by rounding.
_ROUNDING = 1e-12


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact test, two-sided: the p-value if ``lost`` of the questions are answered right by the first model
    only and ``gained`` by the second only. Where the models are equally good, each of them is a toss of a coin.
    """
    discordant = lost + gained
    tail = sum(math.comb(discordant, count) for count in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def sign_flip(cluster_sums: Sequence[float]) -> float:
    """The p-value of the sign-flip test for the sum of differences of each independent cluster, two-sided.

    Where the models are equally good, each sum is as likely with the other sign. The p-value is the part of the
    assignments of signs whose total is at least as far from 0 as the observed one: of all of them for up to 16
    clusters, else of the observed one and 20,000 that are drawn with a fixed seed.
    """
    # A cluster without a difference has the same sum under both signs.
    sums = [value for value in cluster_sums if value != 0]
    total = math.fsum(map(abs, sums))
    observed = abs(math.fsum(sums)) - _ROUNDING * total
    if len(sums) <= _ENUMERATED:
        every = _signed_sums(sums)
        return sum(abs(value) >= observed for value in every) / len(every)
    extreme = sum(abs(value) >= observed for value in _drawn_sums(sums))
    return (1 + extreme) / (1 + _DRAWS)


def smallest_sign_flip_p(clusters: int) -> float:
    """The smallest p-value that ``sign_flip`` can give for so many clusters."""
    return 2.0 ** (1 - clusters) if clusters <= _ENUMERATED else 1 / (1 + _DRAWS)


def _signed_sums(values: Sequence[float]) -> list[float]:
    """The sum of ``values`` under each of the 2**n assignments of signs."""
    sums = [0.0]
    for value in values:
        sums = [total + signed for signed in (value, -value) for total in sums]
    return sums


def _drawn_sums(values: Sequence[float]) -> list[float]:
    generator = random.Random(_SEED)  # noqa: S311 (no secret)
    totals = [0.0] * _DRAWS
    for start in range(0, len(values), _AT_ONCE):
        drawn = generator.choices(_signed_sums(values[start : start + _AT_ONCE]), k=_DRAWS)
        totals = [total + each for total, each in zip(totals, drawn, strict=True)]
    return totals


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order.

    To call those at most α significant is wrong for any of the true hypotheses with a probability of at most α,
    however the tests depend on each other (Holm, 1979).
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted
