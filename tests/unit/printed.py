"""What the commands print of rows, which tests give as the JSON that they are stored and shown as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qbatch.views import compare, job_details
from qbatch.views import results_table as table_of_results
from qbatch.views.comparison import Preference
from qbatch.views.formats import render

Row = dict[str, Any]


def results_table(rows: Sequence[Row]) -> str:
    return table_of_results.results_table(rows)


def comparison(rows: Sequence[Row], preference: Preference, *, by: str, format: str) -> str:  # noqa: A002
    return compare.comparison(rows, preference, by=by, format=format)


def show_jobs(jobs: Sequence[tuple[Row, Row | None]]) -> str:
    return job_details.show_jobs(jobs)


def rendered(rows: Sequence[Row], format: str) -> str:  # noqa: A002
    """``results`` or ``show`` as JSON or CSV."""
    return render(rows, (), format)
