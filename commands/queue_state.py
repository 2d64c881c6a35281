"""``status``, ``jobs`` and ``workers``: what is queued and who works on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from qbatch.commands.context import current_settings, open_database
from qbatch.commands.shared_options import ON_A_TERMINAL, batch_arguments, format_options, limit_option
from qbatch.commands.targets import find_batches
from qbatch.core.domain import JobState

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from qbatch.models_db.time_left import TimeLeft


@click.command()
@batch_arguments()
@limit_option("jobs, or batches (the newest)")
@format_options("table", "json", "csv", "quiet")
def status(batches: Sequence[str], limit: int | None, format_: str) -> None:
    """Show all batches, or some batches and their jobs."""
    from qbatch.models_db.listing import count_batches, list_batches
    from qbatch.models_db.pauses import standing
    from qbatch.models_db.time_left import time_left, with_time_left
    from qbatch.views.formats import render
    from qbatch.views.listings import BATCH_COLUMNS

    settings = current_settings()
    database = open_database(settings)
    ids = find_batches(database, batches)
    limit = _limit(limit, format_)
    with database.read() as session:
        left = time_left(session, lease_s=settings.lease_s)
        found = with_time_left(list_batches(session, ids, limit=limit), left)
        click.echo(render(found, BATCH_COLUMNS, format_), nl=bool(found) or format_ != "quiet")
        if not found:
            click.echo("there is no batch yet: `qbatch submit MODEL` stores one", err=True)
        if limit is not None and not ids:
            _mention_rest("newest", len(found), count_batches(session), "batches")
        for pause in standing(session):
            click.echo(f"no jobs are sent to the workers until disk space is free: {pause.message}", err=True)
        if ids and format_ == "table":
            _print_jobs(session, ids, (), limit, format_, left)


@click.command()
@batch_arguments("jobs")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([s.value for s in JobState]),
    help="Only jobs in this state; may be repeated.",
)
@limit_option("jobs")
@format_options("table", "json", "csv", "quiet")
def jobs(batches: Sequence[str], states: Sequence[str], limit: int | None, format_: str) -> None:
    """List jobs: all, or those of some batches."""
    from qbatch.models_db.time_left import time_left

    settings = current_settings()
    database = open_database(settings)
    ids = find_batches(database, batches)
    with database.read() as session:
        left = time_left(session, lease_s=settings.lease_s)
        _print_jobs(session, ids, states, _limit(limit, format_), format_, left)


def _print_jobs(
    session: Session,
    batch_ids: Sequence[int],
    states: Sequence[str],
    limit: int | None,
    format_: str,
    left: TimeLeft,
) -> None:
    from qbatch.models_db.job_pages import count_jobs
    from qbatch.models_db.listing import list_jobs
    from qbatch.models_db.time_left import with_time_left
    from qbatch.views.formats import render
    from qbatch.views.listings import JOB_COLUMNS, show_mixtures

    found = with_time_left(list_jobs(session, batch_ids=batch_ids, states=states, limit=limit), left)
    rows = show_mixtures(found) if format_ == "table" else found
    click.echo(render(rows, JOB_COLUMNS, format_), nl=bool(found) or format_ != "quiet")
    if format_ == "table" and any(job["state"] == JobState.FAILED for job in found):
        click.echo("`qbatch logs JOB` shows the log of a failed job", err=True)
    if limit is not None and len(found) == limit:
        _mention_rest("first", limit, count_jobs(session, batch_ids=batch_ids, states=states), "jobs")


def _limit(limit: int | None, format_: str) -> int | None:
    """How many rows to show: as many as were asked for, else a page on a terminal, and all for a program."""
    return ON_A_TERMINAL if limit is None and format_ == "table" and sys.stdout.isatty() else limit


def _mention_rest(which: str, shown: int, total: int, rows: str) -> None:
    if shown < total:
        click.echo(f"the {which} {shown} of {total} {rows}; --limit {total} shows all", err=True)


@click.command()
@format_options("table", "json", "csv")
def workers(format_: str) -> None:
    """List the workers, their devices, and what they are working on."""
    from qbatch.models_db.listing import list_workers
    from qbatch.views.formats import render
    from qbatch.views.listings import WORKER_COLUMNS, show_busy

    settings = current_settings()
    with open_database(settings).read() as session:
        found = list_workers(session, settings.lease_s)
    click.echo(render(found if format_ != "table" else show_busy(found), WORKER_COLUMNS, format_))
    if not found:
        click.echo("no worker runs: `qbatch up` starts them here, `qbatch worker` one for a service", err=True)
