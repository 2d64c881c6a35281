"""Means over rows of which only whole clusters are independent: tokens of one window, questions about one passage."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence


def clustered_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of Σ sums / Σ counts: a mean over rows, of which only whole clusters are independent.

    It is the root of the linearised variance of a ratio of totals, G/(G-1) · Σ (S_g - n_g·mean)² / N² (Cochran,
    Sampling Techniques, ch. 9A). Clusters may differ in size. None for a single cluster.
    """
    clusters, rows = len(sums), sum(counts)
    if clusters < 2:
        return None
    mean = math.fsum(sums) / rows
    scatter = math.fsum((total - count * mean) ** 2 for total, count in zip(sums, counts, strict=True))
    return math.sqrt(clusters / (clusters - 1) * scatter) / rows


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[list[float], list[int]]:
    """The sum and the number of the ``values`` in each cluster. ``clusters`` names the cluster of each value."""
    members: dict[Hashable, list[float]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        members[cluster].append(value)
    return [math.fsum(each) for each in members.values()], [len(each) for each in members.values()]
