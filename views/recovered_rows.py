"""What an adapter wins back for its bytes, beside its plain checkpoint and beside other rows of as many bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.quality_bounds import KL_COST, is_same_cost
from qbatch.views.scheme import show_scheme
from qbatch.views.units import show_bytes, show_percent


def recovery_remarks(rows: Sequence[ResultRow]) -> Iterable[str]:
    """Sentences for the rows with an adapter among ``rows``, which may be compared with each other."""
    without_mixture: dict[tuple[str, int], list[ResultRow]] = {}
    for row in rows:
        if row.recovery is None or row.kl_mean is None or row.weights_bytes is None:
            continue
        yield from _beside_plain(row, rows)
        if (said := _better_buy(row, rows) or _beside_mixture(row, rows)) is not None:
            yield said
        else:
            without_mixture.setdefault((row.model, row.weights_bytes), []).append(row)
    for (model, size), adapters in without_mixture.items():
        yield (
            f"Whether layers at 16 bits are a better buy than {' and '.join(map(_name, adapters))} was not measured: "
            f"`qbatch submit {model} --scheme auto --max-weights-bytes {size}` publishes the best mixture of no more "
            "bytes; it can be compared with these if it is given the same --eval-text."
        )


def _beside_plain(row: ResultRow, rows: Sequence[ResultRow]) -> Iterable[str]:
    plain = next((other for other in rows if other.scheme == row.scheme and other.options == _options(row)), None)
    if plain is None or not plain.kl_mean or not plain.weights_bytes or row.weights_bytes is None:
        return
    more = row.weights_bytes - plain.weights_bytes
    price = f"{show_bytes(more)} more weights ({show_percent(more / plain.weights_bytes)})"
    if is_same_cost(KL_COST, row, plain):
        yield f"Whether {_name(row)} wins anything back is not distinguishable; it has {price} than {_name(plain)}."
        return
    share = show_percent((row.kl_mean or 0.0) / plain.kl_mean)
    yield f"{_name(row)} has {share} of the KL of {_name(plain)}, for {price}."


def _better_buy(row: ResultRow, rows: Sequence[ResultRow]) -> str | None:
    """The nearest to the baseline of the rows that take no more memory than an adapter's, if it is nearer than that."""
    able = [other for other in rows if _costs_no_more(other, row)]
    best = min(able, key=lambda other: other.kl_mean or 0.0, default=None)
    if best is None or (best.kl_mean or 0.0) >= (row.kl_mean or 0.0) or is_same_cost(KL_COST, best, row):
        return None
    return _better(best, row)


def _beside_mixture(row: ResultRow, rows: Sequence[ResultRow]) -> str | None:
    """The adapter beside the largest mixture of the same scheme that takes no more memory, and is no better."""
    mixtures = [other for other in rows if _costs_no_more(other, row) and _is_mixture_beside(other, row)]
    mixture = max(mixtures, key=lambda other: other.weights_bytes or 0, default=None)
    if mixture is None:
        return None
    if not is_same_cost(KL_COST, mixture, row):
        return _better(row, mixture)
    return (
        f"{_name(row)} and {_name(mixture)} are not distinguishable: their KL is {_cost(row)} of weights, and "
        f"{_cost(mixture)}."
    )


def _better(one: ResultRow, other: ResultRow) -> str:
    cost = f"its KL is {_cost(one)} of weights, against {_cost(other)}"
    return f"{_name(one)} is a better buy than {_name(other)}: {cost}."


def _options(row: ResultRow) -> dict[str, Any]:
    """The options of the checkpoint that an adapter belongs to."""
    return {name: value for name, value in row.options.items() if name != "recovery"}


def _is_mixture_beside(other: ResultRow, row: ResultRow) -> bool:
    plain = _options(row)
    is_alike = all(other.options.get(name) == value for name, value in plain.items() if name != "skip_modules")
    return other.scheme == row.scheme and is_alike and other.options.get("skip_modules") != plain.get("skip_modules")


def _cost(row: ResultRow) -> str:
    return f"{KL_COST.show(row.kl_mean or 0.0)} with {show_bytes(row.weights_bytes or 0)}"


def _costs_no_more(other: ResultRow, row: ResultRow) -> bool:
    is_other = not other.is_baseline and other.recovery is None and other.kl_mean is not None
    return is_other and (other.weights_bytes or 0) <= (row.weights_bytes or 0)


def _name(row: ResultRow) -> str:
    return f"{row.job_id} {show_scheme(row)}"
