"""What the commands print of rows, which tests give as the JSON that they are stored and shown as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qbatch.core.measured.result_row import ResultRow
from qbatch.models_db.job_record import JobRecord, WholeJob
from qbatch.views import compare, job_details, speed_explanation
from qbatch.views import results_table as table_of_results
from qbatch.views.comparison import Preference
from qbatch.views.formats import render
from qbatch.views.results_table import ResultsScreen, TableLayout

Row = dict[str, Any]


def read(rows: Sequence[Row]) -> list[ResultRow]:
    return [ResultRow.from_json(row) for row in rows]


def results_table(rows: Sequence[Row], others: Sequence[Row] = (), **layout: Any) -> str:
    screen = ResultsScreen(rows=read(rows), others=read(others), layout=TableLayout(**layout))
    return table_of_results.results_table(screen)


def comparison(
    rows: Sequence[Row],
    preference: Preference,
    *,
    by: str,
    format: str,  # noqa: A002
    in_full: bool = True,
) -> str:
    return compare.comparison(read(rows), preference, by=by, format=format, in_full=in_full)


def show_jobs(jobs: Sequence[tuple[Row, Row | None]], *, in_full: bool = True) -> str:
    whole = [
        WholeJob(
            row=ResultRow.from_json(job),
            record=JobRecord.from_json(job),
            baseline=None if baseline is None else ResultRow.from_json(baseline),
        )
        for job, baseline in jobs
    ]
    return job_details.show_jobs(whole, in_full=in_full)


def _pair(row: Row, baseline: Row | None) -> tuple[ResultRow, ResultRow | None]:
    return ResultRow.from_json(row), None if baseline is None else ResultRow.from_json(baseline)


def explain_speed(row: Row, baseline: Row | None) -> list[str]:
    return speed_explanation.explain_speed(
        ResultRow.from_json(row), None if baseline is None else ResultRow.from_json(baseline)
    )


def explain_speed_briefly(row: Row, baseline: Row | None) -> str | None:
    return speed_explanation.explain_speed_briefly(
        ResultRow.from_json(row), None if baseline is None else ResultRow.from_json(baseline)
    )


def rendered(rows: Sequence[Row], format: str) -> str:  # noqa: A002
    """``results`` or ``show`` as JSON or CSV."""
    return render([row.to_json() for row in read(rows)], (), format)
