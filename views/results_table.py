"""The table of results: the answer in any width, with the figures of each row and their ratios to the baseline."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qbatch.core.domain import JobState
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.choices import Choice, choices_of, shipped_jobs
from qbatch.views.comparison import Preference
from qbatch.views.emulation import emulation_remarks
from qbatch.views.figure_table import FigureTable, Line
from qbatch.views.formats import GAP, PROSE_WIDTH, UNLIMITED, printable, terminal_width
from qbatch.views.missing_parts import missing_part_remarks
from qbatch.views.protocol import differences_not_in_heading, show_field, show_protocol
from qbatch.views.ranking import ranked_labels
from qbatch.views.ratios import may_compare
from qbatch.views.result_columns import LABELS, ShownColumn, chosen_columns, find_column, standard_columns
from qbatch.views.scheme import show_scheme
from qbatch.views.speed_explanation import explain_speed_briefly
from qbatch.views.table_legend import PICK_MARK, full_legend, short_legend
from qbatch.views.table_notes import Footnotes, notes_of_all, row_remarks, shown_states
from qbatch.views.totals import sum_up
from qbatch.views.units import show_count
from qbatch.views.wrapped_text import wrap

_REASONS_SHOWN = 12
_NOT_COMPARABLE = "these rows are of several protocols or devices, so their order says little: filter them"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableLayout:
    """How results are shown. ``columns``: exactly these; None for the usual ones that fit. ``is_wide``: all of them,
    however wide the terminal is. ``has_legend``: explain everything. ``sort``: what the rows are ranked by, downwards
    with a dash before it; they are not grouped then."""

    columns: tuple[str, ...] | None = None
    is_wide: bool = False
    has_legend: bool = False
    sort: str | None = None

    @property
    def sorted_by(self) -> str | None:
        return None if self.sort is None else self.sort.removeprefix("-")

    def all_columns(self) -> list[ShownColumn]:
        """The columns that may be shown. What the rows are sorted by always stays."""
        found = standard_columns() if self.columns is None else list(map(_kept, chosen_columns(self.columns)))
        if self.sorted_by is None or self.sorted_by in LABELS:
            return found
        wanted = find_column(self.sorted_by)
        others = [column for column in found if column.key != wanted.key]
        return found if len(others) < len(found) and self.columns else [_kept(wanted), *others]


# In a ranked table, names are shortened before columns of this rank or a lower one leave.
_BESIDE_NAMES = 1


def _kept(column: ShownColumn) -> ShownColumn:
    return replace(column, rank=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows under one heading."""

    heading: Sequence[str]
    rows: Sequence[ResultRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsScreen:
    """The rows to show, and ``others`` of their batches and models: what these are compared with."""

    rows: Sequence[ResultRow]
    others: Sequence[ResultRow] = ()
    preference: Preference = field(default_factory=Preference)
    layout: TableLayout = field(default_factory=TableLayout)

    @property
    def by_id(self) -> Mapping[str, ResultRow]:
        return {row.job_id: row for row in (*self.others, *self.rows)}

    def choices(self) -> list[Choice]:
        return choices_of([*self.others, *self.rows], self.preference)


def results_table(screen: ResultsScreen) -> str:
    """Show results in a table that fits the terminal, with notes, one line of legend, and a sum.

    Rows are grouped by batch and model in the order given, baselines first. Rows of different protocols or devices have
    separate headings. A figure has a ratio only if it was measured under its baseline's protocol, and for speed and
    memory on its baseline's device.
    """
    if not screen.rows:
        return "no results"
    terminal = terminal_width()
    width = UNLIMITED if screen.layout.is_wide else terminal
    text_width = min(terminal, PROSE_WIDTH)
    columns, choices = screen.layout.all_columns(), screen.choices()
    notes, by_id = Footnotes(), screen.by_id
    shared = notes_of_all(screen.rows, by_id)
    states = shown_states(screen.rows)
    maker = _LineMaker(by_id=by_id, picks=shipped_jobs(choices, screen.rows), notes=notes, shared=shared, states=states)
    if screen.layout.sort is None:
        parts = [(part.heading, [maker.line(row) for row in part.rows]) for part in _parts(screen.rows)]
    else:
        parts = [([], maker.ranked(screen.rows, columns, width))]
    lines = [line for _, members in parts for line in members]
    full_table = FigureTable.of(lines, columns)
    table = full_table.fitted(width)
    body = [table.header()] if table.columns else []
    for heading, members in parts:
        body += [*heading, *(text for line in members for text in table.show(line, terminal))]
    texts = [line.label for line in lines] + [ratio for line in lines for ratio in _ratios(line, table)]
    footer = [*_notes(screen, lines, notes, shared)]
    footer += _legend(screen, lines, texts, left_out=full_table.titles_left_out(table))
    footer.append(sum_up(screen.rows, choices))
    return "\n".join([*body, "", *(part for text in footer for part in wrap(text, text_width, indent=GAP))])


def _ratios(line: Line, table: FigureTable) -> Iterable[str]:
    return (line.cell(column)[1] for column in table.shown) if line.remark is None else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _LineMaker:
    """Makes lines of rows. ``shared``: remarks about all of them, which mark none. ``states``: of those without a
    result."""

    by_id: Mapping[str, ResultRow]
    picks: Collection[str]
    notes: Footnotes
    shared: Collection[str]
    states: Mapping[str, str]

    def line(self, row: ResultRow) -> Line:
        return self._line(row, f"{self.mark(row)} {row.job_id} {show_scheme(row)}")

    def ranked(self, rows: Sequence[ResultRow], columns: Sequence[ShownColumn], width: int) -> list[Line]:
        """Lines in the order given, each with its place and its model, shortened where the table would not fit."""
        kept = FigureTable.of([self._line(row, "") for row in rows], [c for c in columns if c.rank <= _BESIDE_NAMES])
        labels = ranked_labels(rows, [self.mark(row) for row in rows], width - kept.figures_width)
        return [self._line(row, label) for row, label in zip(rows, labels, strict=True)]

    def mark(self, row: ResultRow) -> str:
        return PICK_MARK if row.job_id in self.picks else " "

    def _line(self, row: ResultRow, label: str) -> Line:
        if row.state != JobState.SUCCEEDED:
            return Line(row=row, label=label, remark=self.states[row.job_id])
        remarks = [text for text in row_remarks(row, self.by_id) if text not in self.shared]
        marks = "".join(self.notes.mark(text) for text in remarks)
        baseline = self.by_id.get(row.baseline_job_id or "")
        return Line(row=row, label=f"{label} {marks}".rstrip(), baseline=baseline)


# Headings


def _parts(rows: Sequence[ResultRow]) -> Iterable[_Part]:
    models: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        models.setdefault((row.batch_id, row.model, row.revision), []).append(row)
    with_batch = len({row.batch_id for row in rows}) > 1
    measured = [group[0] for group in _measured(rows).values()]
    unlike = None if len(measured) < 2 else differences_not_in_heading(measured)
    for members in models.values():
        yield from _parts_of_model(members, [_heading(members, with_batch)], unlike)


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


# Below the table


def _notes(screen: ResultsScreen, lines: Sequence[Line], notes: Footnotes, shared: Sequence[str]) -> Iterable[str]:
    measured = [line.row for line in lines if line.remark is None]
    if screen.layout.sort is not None and len(_measured(measured)) > 1:
        yield f"Note: {_NOT_COMPARABLE}."
    yield from (f"All: {printable(text)}" for text in shared)
    yield from (f"[{number}] {printable(text)}" for number, text in enumerate(notes.texts, start=1))
    yield from map(printable, missing_part_remarks(measured))
    yield from map(printable, emulation_remarks(measured))


def _legend(screen: ResultsScreen, lines: Sequence[Line], texts: Sequence[str], left_out: list[str]) -> Iterable[str]:
    measured = [line.row for line in lines if line.remark is None]
    if not measured:
        return
    if not screen.layout.has_legend:
        yield short_legend(texts, ["--legend", *(["--wide"] if left_out else [])])
        return
    yield from map(printable, _reasons(measured, screen.by_id))
    if left_out:
        yield f"Not shown, because the terminal is too narrow (--wide): {', '.join(left_out)}."
    yield from full_legend(measured, texts, is_one_protocol=len(_measured(measured)) == 1)


def _reasons(measured: Sequence[ResultRow], by_id: Mapping[str, ResultRow]) -> list[str]:
    """Why rows decode as fast as they do: a line for each row with a reason, up to a limit."""
    reasons = [
        f"{row.job_id} {show_scheme(row)} {reason}."
        for row in measured
        if (reason := explain_speed_briefly(row, _comparable_baseline(row, by_id))) is not None
    ]
    more = len(reasons) - _REASONS_SHOWN
    return reasons[:_REASONS_SHOWN] + ([f"`qbatch show JOB` explains the speed of {more} more."] if more > 0 else [])


def _comparable_baseline(row: ResultRow, by_id: Mapping[str, ResultRow]) -> ResultRow | None:
    baseline = by_id.get(row.baseline_job_id or "")
    return baseline if baseline is not None and may_compare(row, baseline, on_device=True) else None
