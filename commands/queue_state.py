"""``status``, ``jobs`` and ``workers``: what is queued and who works on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from qbatch.commands.context import current_settings, open_database
from qbatch.commands.shared_options import batch_arguments, format_options, limit_option, page_limit
from qbatch.commands.targets import NO_BATCH, find_batches
from qbatch.commands.unserved import why_nothing_runs
from qbatch.core.domain import OPEN_STATES, JobState
from qbatch.core.settings import Settings

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
    from qbatch.models_db.pauses import in_force
    from qbatch.models_db.time_left import time_left, with_time_left
    from qbatch.views.formats import render
    from qbatch.views.listings import BATCH_COLUMNS

    settings = current_settings()
    database = open_database(settings)
    ids = find_batches(database, batches)
    limit = page_limit(limit, format_)
    with database.read() as session:
        left = time_left(session, lease_s=settings.lease_s)
        found = with_time_left(list_batches(session, ids, limit=limit), left)
        click.echo(render(found, BATCH_COLUMNS, format_), nl=bool(found) or format_ != "quiet")
        if not found:
            click.echo(NO_BATCH, err=True)
        if limit is not None and not ids:
            _mention_rest("newest", len(found), count_batches(session), "batches")
        for pause in in_force(session):
            click.echo(f"no jobs are sent to the workers until disk space is free: {pause.message}", err=True)
        if ids and format_ == "table":
            click.echo()
            _print_jobs(settings, session, ids, (), limit, format_, left)
        elif format_ == "table" and (reason := why_nothing_runs(settings, session, _open_batches(found))) is not None:
            click.echo(reason, err=True)


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
        _print_jobs(settings, session, ids, states, page_limit(limit, format_), format_, left)


def _open_batches(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The batches among rows of batches or of jobs that have something left to do, in that order."""
    is_open = {state.value for state in OPEN_STATES}
    found = [row["batch_id"] for row in rows if row.get("state") in is_open or any(row.get(state) for state in is_open)]
    return list(dict.fromkeys(found))


def _print_jobs(
    settings: Settings,
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
    from qbatch.views.listings import JOB_COLUMNS, jobs_table

    found = with_time_left(list_jobs(session, batch_ids=batch_ids, states=states, limit=limit), left)
    is_table = format_ == "table"
    text = jobs_table(found, of_one_batch=len(batch_ids) == 1) if is_table else render(found, JOB_COLUMNS, format_)
    click.echo(text, nl=bool(found) or format_ != "quiet")
    if is_table and (reason := why_nothing_runs(settings, session, _open_batches(found))) is not None:
        click.echo(reason, err=True)
    if limit is not None and len(found) == limit:
        _mention_rest("first", limit, count_jobs(session, batch_ids=batch_ids, states=states), "jobs")


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
