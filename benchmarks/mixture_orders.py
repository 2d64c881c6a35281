"""Other orders in which groups of layers could be kept at 16 bits, to hold the search's own against.

Each is a list of groups, the one to keep first at its head, found on the search's text like its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING

from benchmarks.report import log

if TYPE_CHECKING:
    from qbatch.core.search.sensitivity import Sensitivity
    from qbatch.worker.searching.opened_search import OpenedSearch

Order = Sequence[str]


def every_order(search: OpenedSearch, sensitivity: Sensitivity) -> dict[str, Order]:
    """By name. What each costs is logged, in passes through the whole model."""
    ways: dict[str, Callable[[], Order]] = {
        "derivative": lambda: by_derivative(search, sensitivity),
        "derivative at each mixture": lambda: by_derivative_at_each_mixture(search),
        "alone, from NF4": lambda: by_gain_alone(search),
        "alone, from 16 bits": lambda: by_loss_alone(search),
        "greedy, from 16 bits": lambda: greedily_from_16_bits(search),
    }
    found = {}
    for name, find in ways.items():
        before = search.passes
        found[name] = find()
        log(f"order {name}: {search.passes - before:.0f} passes")
    return found


def by_derivative(search: OpenedSearch, sensitivity: Sensitivity) -> Order:
    slopes = {each.group.name: each.derivative.mean for each in sensitivity.groups if each.derivative is not None}
    return _best_first(search, slopes)


def by_derivative_at_each_mixture(search: OpenedSearch) -> Order:
    """The slopes are computed again after each group that is added."""
    kept: list[str] = []
    while len(kept) < len(search.groups):
        slopes = _slopes(search, set(kept))
        kept.append(next(name for name in _best_first(search, slopes) if name not in kept))
    return kept


def _slopes(search: OpenedSearch, kept: Set[str]) -> dict[str, float]:
    from qbatch.worker.searching.derivative_screen import window_slopes

    search.mixed.keep(kept)
    sums = dict.fromkeys(search.groups, 0.0)
    for number, probe in enumerate(search.probes):
        found = window_slopes(search.mixed, probe, search.loaded.device, search.base.of(number)).slopes
        for name, group in search.groups.items():
            sums[name] -= math.fsum(found.get(module, 0.0) for module in group.modules)
    search.passes += 3.75  # as a search counts it
    return sums


def by_gain_alone(search: OpenedSearch) -> Order:
    """Each group is kept at 16 bits by itself, everything else being quantized."""
    quantized = search.measure(frozenset(), keep_outputs=True)
    gains = {
        name: search.measure({name}, beside=quantized, changed=name, keep_outputs=False).gain_over(quantized).mean
        for name in search.groups
    }
    return _best_first(search, gains)


def by_loss_alone(search: OpenedSearch) -> Order:
    """Each group is quantized by itself, everything else being at 16 bits."""
    return _best_first(search, {name: _kl_without(search, {name}) for name in search.groups})


def greedily_from_16_bits(search: OpenedSearch) -> Order:
    """From everything at 16 bits, the group is quantized that costs least for each byte beside those that are already;
    what it would cost is measured again before it counts, unless another one costs less then."""
    quantized: list[str] = []
    costs = {name: _kl_without(search, {name}) for name in search.groups}
    lost = 0.0
    while costs:
        best, total = "", math.inf
        tried: dict[str, float] = {}
        while not best:
            name = min(costs.keys() - tried.keys(), key=lambda each: search.groups[each].per_byte(costs[each]))
            tried[name] = _kl_without(search, {*quantized, name})
            costs[name] = tried[name] - lost
            least = min(costs, key=lambda each: search.groups[each].per_byte(costs[each]))
            if least in tried:
                best, total = least, tried[least]
        quantized.append(best)
        lost = total
        del costs[best]
    return quantized[::-1]


def _kl_without(search: OpenedSearch, quantized: Set[str]) -> float:
    """With these groups quantized and the others at 16 bits."""
    return search.measure(search.groups.keys() - quantized, keep_outputs=False).kl.mean


def _best_first(search: OpenedSearch, gains: Mapping[str, float]) -> Order:
    return sorted(gains, key=lambda name: search.groups[name].per_byte(gains[name]), reverse=True)
