"""The greedy mixture beside random ones of the same bytes, and beside the first and last layers filled to them.

    python -m benchmarks.mixtures --model examples/models/tiny-llama
    python -m benchmarks.mixtures --model FOLDER --device cuda:0 --random 200 --orders

The frontier is found on the search's text, and everything is judged on another, by default the evaluation text, at 10,
25 and 50 % of the way from NF4 to 16 bits. A random set has groups in random order until it is within 2 % of the greedy
set's extra bytes. Only a model that was trained says anything (``benchmarks.trained_model``). With ``--orders``, other
orders in which groups could be kept at 16 bits are filled to the same bytes too, which takes a few passes a group more.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from benchmarks.mixture_orders import Order, every_order
from benchmarks.report import log

if TYPE_CHECKING:
    from qbatch.core.search.frontier import Frontier
    from qbatch.core.search.sensitivity import LayerGroup
    from qbatch.worker.models.load import LoadedModel
    from qbatch.worker.searching.opened_search import OpenedSearch

FRACTIONS = (0.10, 0.25, 0.50)
_TOLERANCE = 0.02
_MOST_DRAWS = 2000
_SEED = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureRow:
    """``fraction``: extra bytes of the greedy set, of those of keeping everything at 16 bits. The others are shares of
    the KL of the quantized model that are left, on the evaluation text. ``percentile``: of the random sets, how many in
    a hundred leave more than the greedy one. ``random_sets``: how many were found of those bytes. ``orders``: what each
    other order leaves that is filled to at most those bytes."""

    asked: float
    fraction: float
    groups: int
    greedy: float
    greedy_error: float | None
    first_and_last: float
    first_and_last_fraction: float
    random_sets: int
    random_mean: float | None
    random_best: float | None
    percentile: float | None
    orders: Mapping[str, float]


def compare(
    search: OpenedSearch,
    frontier: Frontier,
    *,
    fractions: Sequence[float] = FRACTIONS,
    random_sets: int = 200,
    orders: Mapping[str, Order] = MappingProxyType({}),
) -> list[MixtureRow]:
    """``search``: opened on the text to judge on. ``frontier`` and ``orders``: found on another."""
    quantized = search.measure(frozenset(), keep_outputs=True)
    return [_row(search, frontier, quantized.kl.mean, fraction, random_sets, orders) for fraction in fractions]


def _row(
    search: OpenedSearch,
    frontier: Frontier,
    quantized_kl: float,
    fraction: float,
    random_sets: int,
    orders: Mapping[str, Order],
) -> MixtureRow:
    groups = search.groups
    whole = sum(group.extra_bytes for group in groups.values())
    greedy = greedy_set(frontier, groups, fraction * whole)
    size = _extra(groups, greedy)

    def left(kept: Set[str]) -> float:
        return search.measure(kept, keep_outputs=False).kl.mean / quantized_kl

    mixture = search.measure(greedy, keep_outputs=False).kl
    edges = first_and_last(list(groups.values()), size)
    drawn = [left(kept) for kept in random_mixtures(groups, size, random_sets)]
    log(f"{fraction:.0%}: {len(greedy)} groups, {len(drawn)} random sets")
    mine = mixture.mean / quantized_kl
    return MixtureRow(
        asked=fraction,
        fraction=size / whole,
        groups=len(greedy),
        greedy=mine,
        greedy_error=None if mixture.standard_error is None else mixture.standard_error / quantized_kl,
        first_and_last=left(edges),
        first_and_last_fraction=_extra(groups, edges) / whole,
        random_sets=len(drawn),
        random_mean=sum(drawn) / len(drawn) if drawn else None,
        random_best=min(drawn, default=None),
        percentile=100 * sum(each > mine for each in drawn) / len(drawn) if drawn else None,
        orders={name: left(filled(groups, order, size)) for name, order in orders.items()},
    )


def filled(groups: Mapping[str, LayerGroup], order: Order, most_bytes: float) -> Set[str]:
    """The groups in that order, but for those that would take more than is left."""
    kept: set[str] = set()
    for name in order:
        if _extra(groups, kept | {name}) <= most_bytes:
            kept.add(name)
    return kept


def greedy_set(frontier: Frontier, groups: Mapping[str, LayerGroup], most_bytes: float) -> Set[str]:
    """The largest mixture of the frontier whose extra bytes are at most ``most_bytes``."""
    kept: set[str] = set()
    for point in frontier.points:
        if _extra(groups, kept | set(point.added)) > most_bytes:
            break
        kept |= set(point.added)
    return kept


def first_and_last(groups: Sequence[LayerGroup], most_bytes: float) -> Set[str]:
    """Whole layers from both ends, in turn, and of the next one as many groups as fit. ``groups``: as they run."""
    layers = list(dict.fromkeys(group.layer for group in groups if group.layer is not None))
    by_name = {group.name: group for group in groups}
    inwards = (layers[number // 2] if number % 2 == 0 else layers[-1 - number // 2] for number in range(len(layers)))
    order = [group.name for layer in inwards for group in groups if group.layer == layer]
    return filled(by_name, order, most_bytes)


def random_mixtures(groups: Mapping[str, LayerGroup], size: float, count: int) -> Iterator[Set[str]]:
    """At most ``count`` different sets of groups whose extra bytes are within 2 % of ``size``."""
    generator = random.Random(_SEED)
    seen: set[frozenset[str]] = set()
    for _ in range(_MOST_DRAWS * max(1, count)):
        if len(seen) == count:
            return
        kept: set[str] = set()
        for name in generator.sample(sorted(groups), len(groups)):
            if _extra(groups, kept | {name}) <= size * (1 + _TOLERANCE):
                kept.add(name)
        found = frozenset(kept)
        if _extra(groups, found) >= size * (1 - _TOLERANCE) and found not in seen:
            seen.add(found)
            yield found


def _extra(groups: Mapping[str, LayerGroup], kept: Set[str]) -> int:
    return sum(groups[name].extra_bytes for name in kept)


def measure(
    folder: Path, device: str, random_sets: int, *, judged_by: Path | None = None, has_orders: bool = False
) -> dict[str, object]:
    from qbatch.core.domain import DType, Method, Scheme
    from qbatch.core.search.search_protocol import SearchProtocol
    from qbatch.worker.measuring import DEFAULT_EVAL_TEXT
    from qbatch.worker.models.load import load
    from qbatch.worker.searching import DEFAULT_SEARCH_TEXT
    from qbatch.worker.searching.frontier_search import find_frontier
    from qbatch.worker.searching.opened_search import opened_search
    from qbatch.worker.searching.search_probes import search_probes
    from qbatch.worker.searching.sensitivity_search import measure_sensitivity

    scheme = Scheme(method=Method.NF4, compute_dtype=DType.BFLOAT16)
    protocol = SearchProtocol(text_sha256="0" * 64)

    def loaded() -> LoadedModel:
        return load(folder, dtype=DType.BFLOAT16, device=device)

    model = loaded()
    probes = search_probes(model, protocol, DEFAULT_SEARCH_TEXT.read_text(encoding="utf-8"))
    with opened_search(model, probes, scheme) as search:
        sensitivity = measure_sensitivity(search, protocol)
        frontier = find_frontier(search, sensitivity, protocol)
        log(f"sensitivities took {sensitivity.forward_passes:.1f} passes, mixtures {frontier.forward_passes:.1f}")
        orders = every_order(search, sensitivity) if has_orders else {}
    text = (judged_by or DEFAULT_EVAL_TEXT).read_text(encoding="utf-8")
    probes = search_probes(model := loaded(), protocol, text)
    with opened_search(model, probes, scheme) as judged:
        rows = compare(judged, frontier, random_sets=random_sets, orders=orders)
        quantized = judged.measure(frozenset(), keep_outputs=False)
    return {
        "judged_by": str(judged_by or DEFAULT_EVAL_TEXT.name),
        "windows": len(probes),
        "kl_quantized": quantized.kl.to_json(),
        "groups": len(sensitivity.groups),
        "rank_correlation": sensitivity.rank_correlation,
        "search_passes": sensitivity.forward_passes,
        "frontier_passes": frontier.forward_passes,
        "rows": [asdict(row) for row in rows],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--judged-by", type=Path, help="a text to judge on, instead of the evaluation text")
    parser.add_argument("--orders", action="store_true")
    given = parser.parse_args(argv)
    found = measure(given.model, given.device, given.random, judged_by=given.judged_by, has_orders=given.orders)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
