"""What an adapter wins back for its bytes, beside its plain checkpoint and beside other rows of as many bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qbatch.core.measured.quality_figures import FurtherText
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.methods.registry import describe_row, quant_types
from qbatch.views.quality_bounds import KL_COST, is_same_cost
from qbatch.views.scheme import show_scheme
from qbatch.views.units import show_bytes, show_percent

# A mixture is set beside an adapter as one of as many bytes if it spends so much of what the adapter takes.
_EQUAL_BYTES = 0.8


def recovery_remarks(rows: Sequence[ResultRow], search: ResultRow | None = None) -> Iterable[str]:
    """Sentences for the rows with an adapter among ``rows``, which may be compared with each other. ``search``: the
    newest search for a mixture of the same model, if there is one."""
    without_mixture: dict[str, list[ResultRow]] = {}
    for row in rows:
        if row.recovery is None or row.kl_mean is None or row.weights_bytes is None:
            continue
        yield from _beside_plain(row, rows)
        if (said := _better_buy(row, rows) or _beside_mixture(row, rows, search)) is not None:
            yield said
        else:
            without_mixture.setdefault(_search_command(row), []).append(row)
    for command, adapters in without_mixture.items():
        yield (
            f"Whether layers at 16 bits are a better buy than {' and '.join(map(_name, adapters))} was not measured: "
            f"`{command}` publishes the best mixture of no more bytes; with the same --measure, --eval-text, --tasks "
            "and sizes it can be compared with these."
        )


def _search_command(row: ResultRow) -> str:
    """The command that looks for the mixture of the same method and options, of no more bytes."""
    model = row.model if row.revision is None else f"{row.model}@{row.revision}"
    words = ["qbatch submit", model, "--scheme auto", f"--max-weights-bytes {row.weights_bytes}"]
    quant_type = describe_row(row.scheme).quant_type
    if quant_type != next(iter(quant_types())):
        words.append(f"--quant-type {quant_type}")
    if row.options.get("double_quant"):
        words.append("--double-quant")
    if skipped := row.options.get("skip_modules"):
        words.append(f"--skip-modules {','.join(skipped)}")
    return " ".join(words)


def _beside_plain(row: ResultRow, rows: Sequence[ResultRow]) -> Iterable[str]:
    plain = _plain(row, rows)
    if plain is None or not plain.kl_mean or not plain.weights_bytes or row.weights_bytes is None:
        return
    more = row.weights_bytes - plain.weights_bytes
    price = f"{show_bytes(more)} more weights ({show_percent(more / plain.weights_bytes)})"
    if is_same_cost(KL_COST, row, plain):
        yield f"Whether {_name(row)} wins anything back is not distinguishable; it has {price} than {_name(plain)}."
        return
    share = show_percent((row.kl_mean or 0.0) / plain.kl_mean)
    yield f"{_name(row)} has {share} of the KL of {_name(plain)}, for {price}."


def _plain(row: ResultRow, rows: Sequence[ResultRow]) -> ResultRow | None:
    """The checkpoint that the adapter belongs to."""
    return next((other for other in rows if other.scheme == row.scheme and other.options == _options(row)), None)


def _better_buy(row: ResultRow, rows: Sequence[ResultRow]) -> str | None:
    """The nearest to the baseline of the rows that take no more memory than an adapter's, if it is nearer than that."""
    able = [other for other in rows if _costs_no_more(other, row)]
    best = min(able, key=lambda other: other.kl_mean or 0.0, default=None)
    if best is None or (best.kl_mean or 0.0) >= (row.kl_mean or 0.0) or is_same_cost(KL_COST, best, row):
        return None
    return _better(best, row)


def _beside_mixture(row: ResultRow, rows: Sequence[ResultRow], search: ResultRow | None) -> str | None:
    """The adapter beside the largest mixture of the same scheme that takes no more memory, and is no better. None if
    that takes much less: another one may be better than both."""
    mixtures = [other for other in rows if _costs_no_more(other, row) and _is_mixture_beside(other, row)]
    mixture = max(mixtures, key=lambda other: other.weights_bytes or 0, default=None)
    if mixture is None or not _is_of_its_bytes(mixture, row, _plain(row, rows), search):
        return None
    if not is_same_cost(KL_COST, mixture, row):
        return _better(row, mixture)
    return (
        f"{_name(row)} and {_name(mixture)} are not distinguishable: their KL is {_cost(row)} of weights, and "
        f"{_cost(mixture)}."
    )


def _is_of_its_bytes(mixture: ResultRow, row: ResultRow, plain: ResultRow | None, search: ResultRow | None) -> bool:
    """Whether the mixture takes nearly as many bytes as the adapter, or is the best that a search for so many found."""
    if plain is None:
        return False
    most, none = row.weights_bytes or 0, plain.weights_bytes or 0
    least = none + _EQUAL_BYTES * (most - none)
    sought = None
    if search is not None and search.reused_from == mixture.job_id:
        sought = (search.mixture.bound or {}).get("max_weights_bytes")
    return (mixture.weights_bytes or 0) >= least or (sought is not None and least <= sought <= most)


def _better(one: ResultRow, other: ResultRow) -> str:
    """Which of them is, by the first text; of further ones, whether it is on them too."""
    on_others = {
        name: (mine, its)
        for name, text in (one.details.more_texts or {}).items()
        if (mine := text.quality.kl_mean) is not None
        and (its := (other.details.more_texts or {}).get(name, FurtherText()).quality.kl_mean) is not None
    }
    against = [name for name, (mine, its) in on_others.items() if mine > its]
    where = f" on the first text, and not on {' and '.join(against)}" if against else ""
    figures = "".join(
        f"; on {name} {KL_COST.show(mine)} against {KL_COST.show(its)}" for name, (mine, its) in on_others.items()
    )
    cost = f"its KL is {_cost(one)} of weights, against {_cost(other)}"
    return f"{_name(one)} is a better buy than {_name(other)}{where}: {cost}{figures}."


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
