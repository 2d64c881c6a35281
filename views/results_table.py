"""The table of results: by model, the figures of each row and their ratios to the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qbatch.core.domain import JobState
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.audit_text import audit_warnings, first_names
from qbatch.views.emulation import emulation_remarks
from qbatch.views.figure_table import FigureTable, Line, cells_of, wrap
from qbatch.views.formats import GAP, PROSE_WIDTH, printable, terminal_width
from qbatch.views.groups import timed_apart
from qbatch.views.missing_parts import missing_part_remarks
from qbatch.views.noise import NOISE_MARK, NOT_DISTINGUISHABLE
from qbatch.views.protocol import (
    NOTHING_RUN,
    differences_not_in_heading,
    show_field,
    show_protocol,
    version_differences,
)
from qbatch.views.ratios import may_compare
from qbatch.views.scheme import show_scheme
from qbatch.views.speed_explanation import explain_speed_briefly
from qbatch.views.units import show_count

_REASONS_SHOWN = 12


@dataclass(slots=True)
class Footnotes:
    """Numbered remarks. Equal remarks share a number."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows under one heading."""

    heading: Sequence[str]
    rows: Sequence[ResultRow]


def results_table(rows: Sequence[ResultRow]) -> str:
    """Show the rows of ``qbatch.models_db.results.find_results`` in a table that fits the terminal.

    Footnotes and a legend follow. Rows are grouped by batch and model in the order given, baselines first.
    Rows of different protocols or devices have separate headings. A figure has a ratio only if it was measured under
    its baseline's protocol, and for speed and memory on its baseline's device.
    """
    if not rows:
        return "no results"
    width = terminal_width()
    notes = Footnotes()
    by_id = {row.job_id: row for row in rows}
    parts = [(part, [_line(row, by_id, notes) for row in part.rows]) for part in _parts(rows)]
    lines = [line for _, members in parts for line in members]
    full_table = FigureTable.of(lines)
    table = full_table.fitted(width)
    body = [table.header()] if table.columns else []
    for part, members in parts:
        body += [*part.heading, *(text for line in members for text in table.show(line, width))]
    footer = _footer(lines, by_id, notes, full_table.titles_left_out(table), min(width, PROSE_WIDTH))
    return "\n".join([*body, *footer]).lstrip("\n")


def _parts(rows: Sequence[ResultRow]) -> Iterable[_Part]:
    models: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        models.setdefault((row.batch_id, row.model, row.revision), []).append(row)
    with_batch = len({row.batch_id for row in rows}) > 1
    measured = [group[0] for group in _measured(rows).values()]
    unlike = None if len(measured) < 2 else differences_not_in_heading(measured)
    for members in models.values():
        yield from _parts_of_model(members, ["", _heading(members, with_batch)], unlike)


def _measured(rows: Iterable[ResultRow]) -> dict[tuple[Any, ...], list[ResultRow]]:
    """The rows with figures, by protocol and device."""
    groups: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        if row.state == JobState.SUCCEEDED:
            groups.setdefault((row.protocol_hash, row.device_name), []).append(row)
    return groups


def _parts_of_model(
    members: Sequence[ResultRow], heading: Sequence[str], unlike: Sequence[str] | None
) -> Iterable[_Part]:
    """Yield one part, or one for each protocol and device if the table has several.

    ``unlike``: the names of further protocol fields to show, in which the protocols differ; None if the table has one
    protocol and device.
    """
    measured = {} if unlike is None else _measured(members)
    for group in measured.values():
        protocol = group[0].protocol.stored
        more = "".join(f", {name} {show_field(name, protocol.get(name))}" for name in unlike or ())
        subheading = f"{GAP}{show_protocol(group[0])}{more}, on {group[0].device_name}"
        yield _Part(heading=[*heading, printable(subheading)], rows=_baseline_first(group))
        heading = []
    others = [row for row in members if not measured or row.state != JobState.SUCCEEDED]
    if others:
        yield _Part(heading=[f"{GAP}not measured"] if measured else heading, rows=_baseline_first(others))


def _baseline_first(rows: Sequence[ResultRow]) -> list[ResultRow]:
    return sorted(rows, key=lambda row: not row.is_baseline)


def _heading(group: Sequence[ResultRow], with_batch: bool) -> str:
    row = group[0]
    parameters = next((r.num_parameters for r in group if r.num_parameters is not None), None)
    return printable(
        row.model
        + (f"@{row.revision}" if row.revision else "")
        + (f" · {show_count(parameters)} parameters" if parameters is not None else "")
        + (f" · {row.batch_id}" if with_batch else "")
    )


def _line(row: ResultRow, by_id: Mapping[str, ResultRow], notes: Footnotes) -> Line:
    label = f"{GAP}{row.job_id} {show_scheme(row)}"
    if row.state != JobState.SUCCEEDED:
        return Line(row=row, label=label, remark=show_state(row))
    baseline = by_id.get(row.baseline_job_id or "")
    marks = "".join(notes.mark(text) for text in _remarks(row, baseline))
    return Line(row=row, label=f"{label} {marks}".rstrip(), cells=cells_of(row, baseline))


def show_state(row: ResultRow) -> str:
    """A row's state and its error, if any: ``failed: cuda_oom: out of memory (see `qbatch logs j7`)``."""
    words = printable(": ".join(filter(None, (row.state, row.error_kind, row.error_message))))
    return f"{words} (see `qbatch logs {row.job_id}`)" if row.state == JobState.FAILED else words


def _remarks(row: ResultRow, baseline: ResultRow | None) -> Iterable[str]:
    if row.reused_from is not None:
        yield "taken from an earlier job's measurement of the same checkpoint and protocol; not measured again"
    yield from audit_warnings(row)
    if row.baseline_job_id is None:
        return
    if baseline is None:
        yield "no ratios: its baseline is not among the rows shown"
    elif baseline.state != JobState.SUCCEEDED:
        yield "no ratios: its baseline has no result"
    elif row.protocol_hash != baseline.protocol_hash:
        yield "no ratios: it was measured with another protocol than its baseline, so the figures cannot be compared"
    elif row.details.fingerprint != baseline.details.fingerprint:
        yield "no ratios: the model's files changed between its baseline's measurement and its own"
    else:
        yield from _other_visit(row, baseline)


def _other_visit(row: ResultRow, baseline: ResultRow) -> Iterable[str]:
    """Yield how the measurements of a row and its baseline differ although their protocol is the same."""
    if row.device_name != baseline.device_name:
        yield f"no ratios of speed and memory: it was measured on {row.device_name}, its baseline on another device"
    elif timed_apart(row, baseline):
        yield "its rounds did not alternate with its baseline's: the host's speed may have changed in between"
    if versions := version_differences([baseline, row]):
        yield f"its baseline was measured with other versions: {', '.join(versions)}"


def _footer(
    lines: Sequence[Line], by_id: Mapping[str, ResultRow], notes: Footnotes, left_out: Sequence[str], width: int
) -> list[str]:
    measured = [line for line in lines if line.cells]
    footer = [""] if measured else []
    for number, text in enumerate(notes.texts, start=1):
        footer += wrap(printable(text), width, first=f"[{number}] ", indent=GAP * 2)
    for text in _reasons(measured, by_id):
        footer += wrap(printable(text), width, indent=GAP * 2)
    if left_out:
        footer += wrap(f"Not shown, because the terminal is too narrow: {', '.join(left_out)}.", width)
    for text in _legend(measured):
        footer += wrap(text, width)
    return footer


def _reasons(measured: Sequence[Line], by_id: Mapping[str, ResultRow]) -> list[str]:
    """Why rows decode as fast as they do: a line for each row with a reason, up to a limit."""
    reasons = [
        f"{line.row.job_id} {show_scheme(line.row)} {reason}."
        for line in measured
        if (reason := explain_speed_briefly(line.row, _comparable_baseline(line.row, by_id))) is not None
    ]
    more = len(reasons) - _REASONS_SHOWN
    return reasons[:_REASONS_SHOWN] + ([f"`qbatch show JOB` explains the speed of {more} more."] if more > 0 else [])


def _comparable_baseline(row: ResultRow, by_id: Mapping[str, ResultRow]) -> ResultRow | None:
    baseline = by_id.get(row.baseline_job_id or "")
    return baseline if baseline is not None and may_compare(row, baseline, on_device=True) else None


def _shapes_of_one_protocol(rows: Sequence[ResultRow]) -> Iterable[str]:
    """Yield the shapes that were run under one protocol, which depend on a model's maximum length and task."""
    shapes: dict[str, list[str]] = {}
    for row in rows:
        shapes.setdefault(show_protocol(row), []).append(row.job_id)
    for shape, jobs in shapes.items():
        if shape != NOTHING_RUN:
            yield f"{'All' if len(shapes) == 1 else first_names(jobs)} were measured with {shape}."


def _legend(measured: Sequence[Line]) -> Iterable[str]:
    rows = [line.row for line in measured]
    if any(row.baseline_job_id is not None for row in rows):
        yield (
            "× is a figure divided by that of the baseline, the same model unquantized: ×0.5 is half the size, half "
            "the time or half the speed. Perplexity, where lower is better, is shown with its change in percent."
        )
    if any(row.graph_decode_tokens_per_s is not None for row in rows):
        yield (
            "Graph decode is the rate of the same kernels under a CUDA graph, without the host: a program that uses "
            "graphs can come near it, `generate` does not."
        )
    if any(row.kl_mean is not None for row in rows):
        yield (
            "KL is the mean Kullback-Leibler divergence of the model's predictions from its baseline's, in nats. top-1 "
            "is how often the most likely token is the same."
        )
    if any(row.details.quality.rank_correlation is not None for row in rows):
        yield "Rank corr is the rank correlation between its similarities of texts and the baseline's."
    if any(ratio.endswith(NOISE_MARK) for line in measured for _, ratio in line.cells):
        yield NOISE_LEGEND
    if len(measured_by := _measured(rows)) == 1:
        yield from _shapes_of_one_protocol(next(iter(measured_by.values())))
    yield from missing_part_remarks(rows)
    timed = [row for row in rows if MeasuredPart.SPEED not in row.not_measured]
    devices = sorted({printable(str(row.device_name)) for row in timed})
    if devices:
        yield f"Speed and memory were measured on {' and '.join(devices)}; other devices give other figures."
    yield from map(printable, emulation_remarks(rows))


NOISE_LEGEND = (
    f"{NOISE_MARK} means {NOT_DISTINGUISHABLE} from the baseline: the rounds do not confirm a difference in speed, or "
    "a difference in quality is below one standard error or no larger than rounding to 16 bits causes by itself."
)
