"""``status``, ``jobs`` and ``workers``: what is queued and who works on it."""

from __future__ import annotations

from collections.abc import Sequence

import click

from qbatch.commands.context import current_settings, open_database, parse_batch_ids, require_batches
from qbatch.commands.shared_options import format_options
from qbatch.core.domain import JobState


@click.command()
@click.argument("batch", required=False)
@format_options("table", "json", "csv")
def status(batch: str | None, format_: str) -> None:
    """Show the batches, or one batch and its jobs."""
    from qbatch.models_db.listing import list_batches, list_jobs
    from qbatch.models_db.pauses import standing
    from qbatch.views.formats import render
    from qbatch.views.listings import BATCH_COLUMNS, JOB_COLUMNS

    ids = parse_batch_ids([batch] if batch else [])
    database = open_database(current_settings())
    require_batches(database, ids)
    with database.read() as session:
        click.echo(render(list_batches(session, ids), BATCH_COLUMNS, format_))
        for pause in standing(session):
            click.echo(f"no jobs are sent to the workers until disk space is free: {pause.message}", err=True)
        if ids and format_ == "table":
            click.echo(render(list_jobs(session, batch_ids=ids), JOB_COLUMNS, format_))


@click.command()
@click.option("--batch", "batches", multiple=True, metavar="BATCH", help="Only jobs of this batch; may be repeated.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([s.value for s in JobState]),
    help="Only jobs in this state; may be repeated.",
)
@format_options("table", "json", "csv")
def jobs(batches: Sequence[str], states: Sequence[str], format_: str) -> None:
    """List jobs."""
    from qbatch.models_db.listing import list_jobs
    from qbatch.views.formats import render
    from qbatch.views.listings import JOB_COLUMNS

    ids = parse_batch_ids(batches)
    database = open_database(current_settings())
    require_batches(database, ids)
    with database.read() as session:
        click.echo(render(list_jobs(session, batch_ids=ids, states=states), JOB_COLUMNS, format_))


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
