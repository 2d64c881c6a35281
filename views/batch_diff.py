"""Two batches compared: what became faster, slower, better or worse, beyond the measured noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qbatch.core.domain import JobState
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.batch_pairs import PairedBatches, RowPair, pair_batches
from qbatch.views.figure_changes import Change, FigureChange
from qbatch.views.formats import GAP, PROSE_WIDTH, printable, render, terminal_width
from qbatch.views.protocol import version_differences
from qbatch.views.scheme import show_scheme
from qbatch.views.units import show_ratio
from qbatch.views.wrapped_text import wrap

# In this order; of the others, the sum says how many there are.
_LISTED = (
    *(Change.FASTER, Change.SLOWER, Change.BETTER, Change.WORSE),
    *(Change.SMALLER, Change.LARGER, Change.UNKNOWN),
)


def batch_diff(before: Sequence[ResultRow], after: Sequence[ResultRow], format: str) -> str:  # noqa: A002
    """Compare the rows of two batches as a table, JSON or CSV."""
    paired = pair_batches(before, after)
    if format == "json":
        return render([_pair_as_mapping(pair) for pair in paired.pairs], (), "json")
    if format == "csv":
        return render([line for pair in paired.pairs for line in _flat(pair)], (), "csv")
    width = terminal_width()
    lines = [line for change in _LISTED for line in _section(change, paired.pairs, width)]
    lines += _not_compared(paired, width)
    footer = [text for text in (*_versions(paired.pairs), _sum(paired)) if text]
    prose = [line for text in footer for line in wrap(printable(text), min(width, PROSE_WIDTH), indent=GAP)]
    return "\n".join([*lines, *([""] if lines else []), *prose])


def _section(change: Change, pairs: Sequence[RowPair], width: int) -> Iterable[str]:
    members = [pair for pair in pairs if change in pair.kinds]
    if members:
        yield f"{change} ({len(members)})"
    for pair in members:
        figures = ", ".join(_figure(one) for one in pair.changes if one.change is change)
        yield from wrap(printable(f"{_name(pair)}: {figures}"), width, first=GAP, indent=GAP * 3)


def _name(pair: RowPair) -> str:
    name = _model(pair.after).rstrip("/").rpartition("/")[2]
    return f"{pair.before.job_id} → {pair.after.job_id} {name} {show_scheme(pair.after)}"


def _model(row: ResultRow) -> str:
    return row.model + (f"@{row.revision}" if row.revision else "")


def _figure(change: FigureChange) -> str:
    ratio = "" if change.ratio is None or change.is_ratio else f" {show_ratio(change.ratio)}"
    return f"{change.label} {change.before_text} → {change.after_text}{ratio}"


def _not_compared(paired: PairedBatches, width: int) -> Iterable[str]:
    reasons = [(f"{_name(pair)}: {pair.why_not}") for pair in paired.pairs if pair.why_not is not None]
    for title, texts in (
        ("not compared", reasons),
        ("only in the first", [_alone(row) for row in paired.only_before]),
        ("only in the second", [_alone(row) for row in paired.only_after]),
    ):
        if texts:
            yield f"{title} ({len(texts)})"
        for text in texts:
            yield from wrap(printable(text), width, first=GAP, indent=GAP * 3)


def _alone(row: ResultRow) -> str:
    state = "" if row.state == JobState.SUCCEEDED else f": {row.state}"
    return f"{row.job_id} {_model(row)} {show_scheme(row)}{state}"


def _versions(pairs: Sequence[RowPair]) -> Iterable[str]:
    """Yield what else may explain a difference: the two batches were not timed in turns."""
    compared = [pair for pair in pairs if pair.why_not is None]
    if any(pair.kinds & {Change.FASTER, Change.SLOWER} for pair in compared):
        yield "The two were timed at different times: a change of the host or its load is not in the measured noise."
    found = dict.fromkeys(text for pair in compared for text in version_differences([pair.before, pair.after]))
    if found:
        yield f"The versions differ, which may explain a difference: {', '.join(found)}."


def _sum(paired: PairedBatches) -> str:
    """``24 pairs: 8 faster, 0 slower, 7 better, 0 worse, 9 within noise; 1 not compared.``"""
    compared = [pair for pair in paired.pairs if pair.why_not is None and not pair.is_one_measurement]
    counts = Counter(kind for pair in compared for kind in pair.kinds)
    always = (Change.FASTER, Change.SLOWER, Change.BETTER, Change.WORSE)
    kinds = [f"{counts[kind]} {kind}" for kind in _LISTED if kind in always or counts[kind]]
    alike = sum(pair.kinds <= {Change.NOISE} for pair in compared)
    others = {
        "of the same measurement": sum(pair.is_one_measurement for pair in paired.pairs),
        "not compared": sum(pair.why_not is not None for pair in paired.pairs),
        "only in the first": len(paired.only_before),
        "only in the second": len(paired.only_after),
    }
    rest = "".join(f"; {count} {what}" for what, count in others.items() if count)
    pairs = f"{len(compared)} pair{'' if len(compared) == 1 else 's'} compared"
    return f"{pairs}: {', '.join([*kinds, f'{alike} within the measured noise'])}{rest}."


# For programs


def _pair_as_mapping(pair: RowPair) -> Mapping[str, Any]:
    return {
        **_of_pair(pair),
        "not_compared": pair.why_not,
        "same_measurement": pair.is_one_measurement,
        "versions_differ_in": version_differences([pair.before, pair.after]) if pair.why_not is None else [],
        "changes": [_change_as_mapping(change) for change in pair.changes],
    }


def _flat(pair: RowPair) -> Iterable[Mapping[str, Any]]:
    yield from ({**_of_pair(pair), **_change_as_mapping(change)} for change in pair.changes)


def _of_pair(pair: RowPair) -> dict[str, Any]:
    return {
        "model": pair.after.model,
        "revision": pair.after.revision,
        "scheme": pair.after.scheme,
        "label": show_scheme(pair.after),
        "job_before": pair.before.job_id,
        "job_after": pair.after.job_id,
    }


def _change_as_mapping(change: FigureChange) -> dict[str, Any]:
    return {
        "figure": change.key,
        "name": change.label,
        "before": change.before,
        "after": change.after,
        "ratio": change.ratio,
        "change": change.change.value,
    }
