"""Two batches compared: what became faster, slower, better or worse, beyond the measured noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.batch_pairs import PairedBatches, RowPair, pair_batches
from qbatch.views.figure_changes import Change, FigureChange
from qbatch.views.formats import GAP, PROSE_WIDTH, printable, render, terminal_width
from qbatch.views.groups import source_name, timed_job
from qbatch.views.protocol import version_differences
from qbatch.views.scheme import show_scheme
from qbatch.views.shared_failures import name_jobs
from qbatch.views.units import show_ratio
from qbatch.views.wrapped_text import wrap

_NAMED = 3
# In this order; of the others, the sum says how many there are.
_LISTED = (
    *(Change.FASTER, Change.SLOWER, Change.BETTER, Change.WORSE),
    *(Change.SMALLER, Change.LARGER, Change.UNCERTAIN, Change.UNKNOWN),
)

_OF_SPEED = (Change.FASTER, Change.SLOWER, Change.UNCERTAIN)


def batch_diff(before: Sequence[ResultRow], after: Sequence[ResultRow], format: str) -> str:  # noqa: A002
    """Compare the rows of two batches as a table, JSON or CSV."""
    paired = pair_batches(before, after)
    if format == "json":
        alone = [_alone_as_mapping(row, "first") for row in paired.only_before]
        alone += [_alone_as_mapping(row, "second") for row in paired.only_after]
        return render([*map(_pair_as_mapping, paired.pairs), *alone], (), "json")
    if format == "csv":
        return render([line for pair in paired.pairs for line in _flat(pair)], (), "csv")
    width = terminal_width()
    lines = [line for change in _LISTED for line in _section(change, paired.pairs, width)]
    lines += _not_compared(paired, width)
    footer = [*_parts_of_one(paired.pairs), *_shared_speeds(paired.pairs), *_versions(paired.pairs), _sum(paired)]
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
    return f"{pair.before.job_id} → {pair.after.job_id} {_short_name(pair.after)}"


def _short_name(row: ResultRow) -> str:
    return f"{source_name(row).rstrip('/').rpartition('/')[2]} {show_scheme(row)}"


def _figure(change: FigureChange) -> str:
    ratio = "" if change.ratio is None or change.is_ratio else f" {show_ratio(change.ratio)}"
    return f"{change.label} {change.before_text} → {change.after_text}{ratio}"


def _not_compared(paired: PairedBatches, width: int) -> Iterable[str]:
    """Yield a line for each reason, and one for what each batch has alone, however many jobs that is."""
    reasons: dict[str, list[str]] = {}
    for pair in paired.pairs:
        if pair.why_not is not None:
            reasons.setdefault(pair.why_not, []).append(_name(pair))
    texts = [f"not compared ({len(names)}), {why}: {name_jobs(names, _NAMED)}" for why, names in reasons.items()]
    for which, rows in (("first", paired.only_before), ("second", paired.only_after)):
        if rows:
            names = [f"{row.job_id} {_short_name(row)}" for row in rows]
            texts.append(f"only in the {which} ({len(rows)}): {name_jobs(names, _NAMED)}")
    for text in texts:
        yield from wrap(printable(text), width, indent=GAP)


def _parts_of_one(pairs: Sequence[RowPair]) -> Iterable[str]:
    """Yield which parts only one of the batches measured."""
    parts = [(pair.before.protocol.parts, pair.after.protocol.parts) for pair in pairs if pair.why_not is None]
    for part in (MeasuredPart.QUALITY, MeasuredPart.SPEED):
        for which, alone in (("first", [a - b for a, b in parts]), ("second", [b - a for a, b in parts])):
            if any(part in some for some in alone):
                yield f"{part.value.capitalize()} was measured in the {which} alone, so it is not compared."


def _shared_speeds(pairs: Sequence[RowPair]) -> Iterable[str]:
    """Yield how many pairs have speeds that were measured with other models: they are no further measurements."""
    shared = [pair for pair in pairs if pair.kinds and (pair.before.speed_from or pair.after.speed_from)]
    if shared:
        timed = len({_timed(pair) for pair in shared})
        yield (
            f"The speeds of {len(shared)} pairs are those of other models of the same shape, and are {timed} "
            f"measurement{'' if timed == 1 else 's'}: so often they are counted below."
        )


def _timed(pair: RowPair) -> tuple[str, str]:
    return timed_job(pair.before), timed_job(pair.after)


def _versions(pairs: Sequence[RowPair]) -> Iterable[str]:
    """Yield what else may explain a difference: the two batches were not timed in turns."""
    compared = [pair for pair in pairs if pair.why_not is None]
    if any(Change.UNCERTAIN in pair.kinds for pair in compared):
        yield "Uncertain are differences in speed of more than 10 % that the rounds do not confirm."
    if any(pair.kinds & {Change.FASTER, Change.SLOWER} for pair in compared):
        yield "The two were timed at different times: a change of the host or its load is not in the measured noise."
    found = dict.fromkeys(text for pair in compared for text in version_differences([pair.before, pair.after]))
    if found:
        yield f"The versions differ, which may explain a difference: {', '.join(found)}."


def _sum(paired: PairedBatches) -> str:
    """``24 pairs: 8 faster, 0 slower, 7 better, 0 worse, 9 within noise; 1 not compared.``"""
    compared = [pair for pair in paired.pairs if pair.why_not is None and not pair.is_one_measurement]
    # One speed of several models is one measurement.
    found = {
        (kind, _timed(pair) if kind in _OF_SPEED else pair.after.job_id) for pair in compared for kind in pair.kinds
    }
    counts = Counter(kind for kind, _ in found)
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
        **_of_rows(pair.before, pair.after),
        "not_compared": pair.why_not,
        "same_measurement": pair.is_one_measurement,
        "versions_differ_in": version_differences([pair.before, pair.after]) if pair.why_not is None else [],
        "changes": [_change_as_mapping(change) for change in pair.changes],
    }


def _alone_as_mapping(row: ResultRow, which: str) -> Mapping[str, Any]:
    """A row without a counterpart, as a pair that was not compared."""
    return {
        **_of_row(row),
        "job_before": row.job_id if which == "first" else None,
        "job_after": row.job_id if which == "second" else None,
        "speed_from_before": row.speed_from if which == "first" else None,
        "speed_from_after": row.speed_from if which == "second" else None,
        "not_compared": f"only in the {which}",
        "same_measurement": False,
        "versions_differ_in": [],
        "changes": [],
    }


def _flat(pair: RowPair) -> Iterable[Mapping[str, Any]]:
    yield from ({**_of_rows(pair.before, pair.after), **_change_as_mapping(change)} for change in pair.changes)


def _of_rows(before: ResultRow, after: ResultRow) -> dict[str, Any]:
    return {
        **_of_row(after),
        "job_before": before.job_id,
        "job_after": after.job_id,
        "speed_from_before": before.speed_from,
        "speed_from_after": after.speed_from,
    }


def _of_row(row: ResultRow) -> dict[str, Any]:
    return {"model": row.model, "revision": row.revision, "scheme": row.scheme, "label": show_scheme(row)}


def _change_as_mapping(change: FigureChange) -> dict[str, Any]:
    return {
        "figure": change.key,
        "name": change.label,
        "before": change.before,
        "after": change.after,
        "ratio": change.ratio,
        "change": change.change.value,
    }
