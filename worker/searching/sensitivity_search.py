"""The sensitivity of every group of layers: screened by one backward pass, then measured where that leaves it open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise

from qbatch.core.errors import CudaOom, HostOom
from qbatch.core.search.search_protocol import SearchProtocol
from qbatch.core.search.sensitivity import STANDARD_ERRORS, Estimate, GroupSensitivity, LayerGroup, Sensitivity
from qbatch.views.units import show_bytes
from qbatch.worker.machine.device_faults import device_fault
from qbatch.worker.measuring.stats import rank_correlation
from qbatch.worker.searching.backward_memory import backward_bytes, free_bytes
from qbatch.worker.searching.group_slopes import Gains, group_slopes
from qbatch.worker.searching.mixture_quality import MixtureQuality, estimate
from qbatch.worker.searching.opened_search import OpenedSearch

_LEAST_RANKED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenedGroups:
    """``gains`` is None where no backward pass was made; ``why_not`` then says why."""

    quantized: MixtureQuality
    gains: Gains | None
    why_not: str | None


def measure_sensitivity(
    search: OpenedSearch, protocol: SearchProtocol, *, memory_bytes: int | None = None
) -> Sensitivity:
    """The sensitivities of all groups of an opened search. ``memory_bytes``: what a backward pass may take; by default
    what is free."""
    screened = _screened(search, memory_bytes)
    search.quantized = screened.quantized
    open_groups = _open_groups(search, screened)
    allowed = math.inf if screened.gains is None else protocol.passes_allowed(len(search.groups))
    measured = _measured(search, screened, open_groups, allowed)
    return _sensitivity(search, screened, open_groups, measured)


def _screened(search: OpenedSearch, memory_bytes: int | None) -> ScreenedGroups:
    why_not = _why_no_backward_pass(search, free_bytes(search.loaded.device) if memory_bytes is None else memory_bytes)
    if why_not is None:
        try:
            return _slopes(search)
        except Exception as error:
            if device_fault(error) not in (CudaOom, HostOom):
                raise
            why_not = "the memory was too small for a backward pass, although it was predicted to fit"
    return ScreenedGroups(quantized=search.measure(frozenset(), keep_outputs=True), gains=None, why_not=why_not)


def _why_no_backward_pass(search: OpenedSearch, free: int) -> str | None:
    search.mixed.keep(frozenset())
    longest = max(search.probes, key=lambda probe: len(probe.ids))
    needed = backward_bytes(search.mixed, longest, search.loaded.device)
    if needed <= free:
        return None
    return (
        f"a backward pass over {len(longest.ids)} tokens is predicted to take {show_bytes(needed)} besides the "
        f"weights, of {show_bytes(free)} that are free"
    )


def _slopes(search: OpenedSearch) -> ScreenedGroups:
    search.mixed.keep(frozenset())
    found = group_slopes(search, keep_outputs=True)
    quantized = MixtureQuality(at_16_bits=frozenset(), windows=found.windows, outputs=found.outputs)
    why_not = None if found.is_finite else "the gradients were not finite"
    return ScreenedGroups(quantized=quantized, gains=found.gains if found.is_finite else None, why_not=why_not)


def _open_groups(search: OpenedSearch, screened: ScreenedGroups) -> Set[str]:
    """The groups whose gain per byte is within two errors of that of the next one in the order, paired by window, and
    those without a slope, whose place nobody knows."""
    if screened.gains is None:
        return search.groups.keys()
    per_byte = {name: [*map(search.groups[name].per_byte, sums)] for name, sums in screened.gains.items()}
    order = sorted(per_byte, key=lambda name: math.fsum(per_byte[name]), reverse=True)
    unclear = {name for name, sums in per_byte.items() if not any(sums)}
    for better, worse in pairwise(order):
        pairs = zip(per_byte[better], per_byte[worse], strict=True)
        difference = estimate([first - second for first, second in pairs], screened.quantized.rows)
        error = difference.standard_error
        if error is None or difference.mean <= STANDARD_ERRORS * error:
            unclear |= {better, worse}
    return unclear


def _measured(
    search: OpenedSearch, screened: ScreenedGroups, open_groups: Set[str], allowed: float
) -> dict[str, Estimate]:
    """The measured gains of the open groups, those first that promise most per byte, within the passes allowed."""
    gains = screened.gains
    promise = {
        name: 0.0 if gains is None else search.groups[name].per_byte(math.fsum(gains[name])) for name in open_groups
    }
    measured = {}
    for name in sorted(open_groups, key=lambda name: promise[name], reverse=True):
        if search.passes + search.cost(name) > allowed:
            continue
        search.report(f"measuring {name}")
        alone = search.measure({name}, beside=screened.quantized, changed=name, keep_outputs=False)
        measured[name] = alone.gain_over(screened.quantized)
    return measured


def _sensitivity(
    search: OpenedSearch, screened: ScreenedGroups, open_groups: Set[str], measured: Mapping[str, Estimate]
) -> Sensitivity:
    rows = screened.quantized.rows
    groups = [
        GroupSensitivity(
            group=group,
            derivative=None if screened.gains is None else estimate(screened.gains[name], rows),
            measured=measured.get(name),
            is_open=name in open_groups,
            weight_errors=search.mixed.errors[name],
        )
        for name, group in search.groups.items()
    ]
    both = [
        (each.group, each.derivative.mean, each.measured.mean)
        for each in groups
        if each.derivative is not None and each.measured is not None
    ]
    predicted = math.fsum(derivative for _, derivative, _ in both)
    found = Sensitivity(
        method=search.scheme.method,
        windows=len(rows),
        rows=sum(rows),
        kl=screened.quantized.kl,
        groups=tuple(groups),
        compared_groups=len(both),
        rank_correlation=_ranks(both) if len(both) >= _LEAST_RANKED else None,
        slope_scale=math.fsum(gain for _, _, gain in both) / predicted if both and predicted > 0 else None,
        unreached=tuple(group.name for group in search.layers.unreached),
        forward_passes=search.passes,
        why_no_derivative=screened.why_not,
    )
    best_first = sorted(found.groups, key=found.gain_per_byte, reverse=True)
    return replace(found, groups=tuple(best_first))


def _ranks(both: Sequence[tuple[LayerGroup, float, float]]) -> float | None:
    correlation = rank_correlation(
        [group.per_byte(derivative) for group, derivative, _ in both],
        [group.per_byte(gain) for group, _, gain in both],
    )
    return correlation if math.isfinite(correlation) else None
