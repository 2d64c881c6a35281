"""``status``, ``jobs`` and ``workers``: what is queued and who works on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from qbatch.commands.context import current_settings, open_database, parse_batch_ids, require_batches
from qbatch.commands.shared_options import ON_A_TERMINAL, format_options, limit_option
from qbatch.core.domain import JobState

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@click.command()
@click.argument("batch", required=False)
@limit_option("jobs, or batches (the newest)")
@format_options("table", "json", "csv")
def status(batch: str | None, limit: int | None, format_: str) -> None:
    """Show the batches, or one batch and its jobs."""
    from qbatch.models_db.listing import count_batches, list_batches
    from qbatch.models_db.pauses import standing
    from qbatch.views.formats import render
    from qbatch.views.listings import BATCH_COLUMNS

    ids = parse_batch_ids([batch] if batch else [])
    database = open_database(current_settings())
    require_batches(database, ids)
    limit = _limit(limit, format_)
    with database.read() as session:
        batches = list_batches(session, ids, limit=limit)
        click.echo(render(batches, BATCH_COLUMNS, format_))
        if limit is not None and not ids:
            _mention_rest("newest", len(batches), count_batches(session), "batches")
        for pause in standing(session):
            click.echo(f"no jobs are sent to the workers until disk space is free: {pause.message}", err=True)
        if ids and format_ == "table":
            _print_jobs(session, ids, (), limit, format_)


@click.command()
@click.option("--batch", "batches", multiple=True, metavar="BATCH", help="Only jobs of this batch; may be repeated.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([s.value for s in JobState]),
    help="Only jobs in this state; may be repeated.",
)
@limit_option("jobs")
@format_options("table", "json", "csv")
def jobs(batches: Sequence[str], states: Sequence[str], limit: int | None, format_: str) -> None:
    """List jobs."""
    ids = parse_batch_ids(batches)
    database = open_database(current_settings())
    require_batches(database, ids)
    with database.read() as session:
        _print_jobs(session, ids, states, _limit(limit, format_), format_)


def _print_jobs(
    session: Session, batch_ids: Sequence[int], states: Sequence[str], limit: int | None, format_: str
) -> None:
    from qbatch.models_db.job_pages import count_jobs
    from qbatch.models_db.listing import list_jobs
    from qbatch.views.formats import render
    from qbatch.views.listings import JOB_COLUMNS

    found = list_jobs(session, batch_ids=batch_ids, states=states, limit=limit)
    click.echo(render(found, JOB_COLUMNS, format_))
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
    from qbatch.views.listings import WORKER_COLUMNS

    settings = current_settings()
    with open_database(settings).read() as session:
        click.echo(render(list_workers(session, settings.lease_s), WORKER_COLUMNS, format_))
