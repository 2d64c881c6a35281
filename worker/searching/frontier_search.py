"""Mixtures found greedily: to each the group is added that gains most per byte beside those that are there already.

A group's gain falls as others are kept at 16 bits, so what was measured earlier is measured again before it counts: the
group that promised most is added to the mixture, which is measured whole, and it stays if that is still more per byte
than any other promises (the lazy greedy algorithm of Minoux, 1978). So each point of the frontier is a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qbatch.core.search.frontier import Frontier, FrontierPoint
from qbatch.core.search.search_protocol import SearchProtocol
from qbatch.core.search.sensitivity import STANDARD_ERRORS, Sensitivity
from qbatch.worker.searching.mixture_quality import MixtureQuality, estimate
from qbatch.worker.searching.opened_search import OpenedSearch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A group and the mixture with it added. ``per_byte``: what it gained."""

    group: str
    quality: MixtureQuality
    per_byte: float


def find_frontier(search: OpenedSearch, sensitivity: Sensitivity, protocol: SearchProtocol) -> Frontier:
    """The frontier of an opened search, from everything quantized to everything at 16 bits, or to the first mixture
    whose KL is no more than 16-bit arithmetic alone causes. ``sensitivity`` is what the groups promise at first."""
    begin = search.passes
    promises = {each.group.name: sensitivity.gain_per_byte(each) for each in sensitivity.groups}
    current = search.quantized or search.measure(frozenset(), keep_outputs=True)
    points, sums = [_point(search, current)], [current.kl_sums]
    while promises and current.kl.mean > (search.floor_kl or 0.0):
        best = _best(search, current, promises, protocol.most_tries)
        del promises[best.group]
        sums.append(best.quality.kl_sums)
        same_as = same_kl_as_earlier(sums, current.rows, search.floor_kl)
        points.append(_point(search, best.quality, before=current, added=best.group, same_as=same_as))
        search.report(f"{len(best.quality.at_16_bits)} of {len(search.groups)} groups at 16 bits: {best.group}")
        current = best.quality
    return Frontier(
        method=search.scheme.method,
        windows=len(search.probes),
        rows=sum(current.rows),
        points=tuple(points),
        forward_passes=search.passes - begin,
        floor_kl=search.floor_kl,
    )


def same_kl_as_earlier(sums: Sequence[Sequence[float]], rows: Sequence[int], floor: float | None) -> int | None:
    """The index of the first mixture that the last one cannot be told from, None if it can from all: on the same
    windows they differ by less than two errors, or both are at most at the ``floor``. ``sums``: of each mixture, the KL
    of each window's ``rows`` together."""
    *earlier, last = sums
    for index, other in enumerate(earlier):
        if floor is not None and max(sum(other), sum(last)) <= floor * sum(rows):
            return index
        difference = estimate([one - two for one, two in zip(other, last, strict=True)], rows)
        error = difference.standard_error
        if difference.mean == 0 or (error is not None and abs(difference.mean) < STANDARD_ERRORS * error):
            return index
    return None


def _best(search: OpenedSearch, current: MixtureQuality, promises: dict[str, float], most_tries: int) -> _Candidate:
    """The best of the groups that promise most. What they turn out to gain replaces what they promised."""
    best: _Candidate | None = None
    untried = set(promises)
    for _ in range(min(most_tries, len(promises))):
        name = max(untried, key=lambda group: promises[group])
        if best is not None and best.per_byte >= promises[name]:
            break
        untried.remove(name)
        candidate = _tried(search, current, name)
        promises[name] = candidate.per_byte
        if best is None or candidate.per_byte > best.per_byte:
            best = candidate
    if best is None:
        raise ValueError("no group is left to add")
    return best


def _tried(search: OpenedSearch, current: MixtureQuality, name: str) -> _Candidate:
    quality = search.measure({*current.at_16_bits, name}, beside=current, changed=name, keep_outputs=True)
    per_byte = search.groups[name].per_byte(quality.gain_over(current).mean)
    return _Candidate(group=name, quality=quality, per_byte=per_byte)


def _point(
    search: OpenedSearch,
    quality: MixtureQuality,
    *,
    before: MixtureQuality | None = None,
    added: str | None = None,
    same_as: int | None = None,
) -> FrontierPoint:
    kept = [group for group in search.layers.groups if group.name in quality.at_16_bits]
    return FrontierPoint(
        added=() if added is None else (added,),
        modules=tuple(module for group in kept for module in group.modules),
        weights_bytes=search.weights_bytes(quality.at_16_bits),
        kl=quality.kl,
        gain=None if before is None else quality.gain_over(before),
        ln_ppl_ratio=quality.ln_ppl_ratio,
        same_as=same_as,
    )
