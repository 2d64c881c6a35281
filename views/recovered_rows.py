"""What an adapter wins back for its bytes, beside its plain checkpoint and beside other rows of as many bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.quality_bounds import KL_COST, is_same_cost
from qbatch.views.scheme import show_scheme
from qbatch.views.units import show_bytes, show_percent


def recovery_remarks(rows: Sequence[ResultRow]) -> Iterable[str]:
    """Sentences for the rows with an adapter among ``rows``, which may be compared with each other."""
    for row in rows:
        if row.recovery is not None and row.kl_mean is not None and row.weights_bytes is not None:
            yield from _beside_plain(row, rows)
            yield from _better_buy(row, rows)


def _beside_plain(row: ResultRow, rows: Sequence[ResultRow]) -> Iterable[str]:
    options = {name: value for name, value in row.options.items() if name != "recovery"}
    plain = next((other for other in rows if other.scheme == row.scheme and other.options == options), None)
    if plain is None or not plain.kl_mean or not plain.weights_bytes or row.weights_bytes is None:
        return
    more = row.weights_bytes - plain.weights_bytes
    price = f"{show_bytes(more)} more weights ({show_percent(more / plain.weights_bytes)})"
    if is_same_cost(KL_COST, row, plain):
        yield f"Whether {_name(row)} wins anything back is not distinguishable; it has {price} than {_name(plain)}."
        return
    share = show_percent((row.kl_mean or 0.0) / plain.kl_mean)
    yield f"{_name(row)} has {share} of the KL of {_name(plain)}, for {price}."


def _better_buy(row: ResultRow, rows: Sequence[ResultRow]) -> Iterable[str]:
    """The nearest to the baseline of the rows that take no more memory than an adapter's, if it is nearer than that."""
    able = [other for other in rows if _costs_no_more(other, row)]
    best = min(able, key=lambda other: other.kl_mean or 0.0, default=None)
    if best is None or (best.kl_mean or 0.0) >= (row.kl_mean or 0.0) or is_same_cost(KL_COST, best, row):
        return
    yield (
        f"{_name(best)} is a better buy than {_name(row)}: its KL is {_cost(best)} of weights, against {_cost(row)}."
    )


def _cost(row: ResultRow) -> str:
    return f"{KL_COST.show(row.kl_mean or 0.0)} with {show_bytes(row.weights_bytes or 0)}"


def _costs_no_more(other: ResultRow, row: ResultRow) -> bool:
    is_other = not other.is_baseline and other.recovery is None and other.kl_mean is not None
    return is_other and (other.weights_bytes or 0) <= (row.weights_bytes or 0)


def _name(row: ResultRow) -> str:
    return f"{row.job_id} {show_scheme(row)}"
