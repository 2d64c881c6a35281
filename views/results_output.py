"""Results in the format that was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qbatch.core.domain import JobState
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.choices import shipped_jobs
from qbatch.views.formats import markdown_table, render
from qbatch.views.missing_parts import missing_part_remarks
from qbatch.views.result_columns import ShownColumn, chosen_columns, standard_columns
from qbatch.views.results_table import ResultsScreen, results_table
from qbatch.views.scheme import show_scheme
from qbatch.views.table_legend import PICK_MARK, full_legend
from qbatch.views.table_notes import show_state
from qbatch.views.totals import sum_up


def results_output(screen: ResultsScreen, format: str) -> str:  # noqa: A002
    """The rows as ``table``, ``json``, ``csv``, ``md`` or ``quiet``, without a newline at the end."""
    if format == "quiet":
        return "\n".join(row.job_id for row in screen.rows)
    if format == "table":
        return results_table(screen)
    if format == "md":
        return _markdown(screen)
    return render([_mapping(row, screen.layout.columns) for row in screen.rows], (), format)


def _mapping(row: ResultRow, columns: Sequence[str] | None) -> Mapping[str, Any]:
    if columns is None:
        return row.to_json()
    chosen = chosen_columns(columns)
    return {
        "job_id": row.job_id,
        "model": row.model,
        "scheme": row.scheme,
        **{column.key: column.value(row) for column in chosen},
    }


def _markdown(screen: ResultsScreen) -> str:
    """A table with a line for each row, what its marks mean, and the sum."""
    if not screen.rows:
        return "no results"
    choices = screen.choices()
    picks = shipped_jobs(choices, screen.rows)
    measured = [row for row in screen.rows if row.state == JobState.SUCCEEDED]
    names = screen.layout.columns
    found = standard_columns() if names is None else chosen_columns(names)
    columns = [(column, title) for column in found if (title := column.title(measured))]
    heads = ["", "job", "model", "scheme", *(title for _, title in columns)]
    lines = [
        [
            PICK_MARK if row.job_id in picks else "",
            row.job_id,
            row.model,
            show_scheme(row),
            *_cells(row, columns, screen),
        ]
        for row in screen.rows
    ]
    marks = [cell for line in lines for cell in line]
    protocols = {(row.protocol_hash, row.device_name) for row in measured}
    notes = [
        *missing_part_remarks(measured),
        *full_legend(measured, marks, is_one_protocol=len(protocols) == 1),
        sum_up(screen.rows, choices),
    ]
    return "\n\n".join([markdown_table(heads, lines), *notes])


def _cells(row: ResultRow, columns: Sequence[tuple[ShownColumn, str]], screen: ResultsScreen) -> Iterable[str]:
    if row.state != JobState.SUCCEEDED:
        yield from [show_state(row), *[""] * (len(columns) - 1)]
        return
    baseline = screen.by_id.get(row.baseline_job_id or "")
    for column, _ in columns:
        yield " ".join(column.cell(row, baseline)).rstrip()
