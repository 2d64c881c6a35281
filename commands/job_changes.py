"""``cancel`` and ``retry``: change the state of jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from qbatch.commands.context import current_settings, open_database, require_batches, require_jobs
from qbatch.commands.sending import send
from qbatch.core.domain import format_job_id, parse_id
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.models_db.session import Database


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="BATCH|JOB...")
def cancel(targets: Sequence[str]) -> None:
    """Cancel batches or jobs. Running jobs are stopped; finished jobs stay as they are."""
    from qbatch.models_db.jobs import cancel as cancel_jobs

    _change(targets, cancel_jobs, "cancelled")


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="BATCH|JOB...")
def retry(targets: Sequence[str]) -> None:
    """Queue failed and cancelled jobs again."""
    from qbatch.models_db.jobs import retry as retry_jobs

    database, settings, changed = _change(targets, retry_jobs, "queued again")
    if changed:
        hint = send(database, settings)
        if hint is not None:
            click.echo(hint, err=True)


def _change(
    targets: Sequence[str], change: Callable[..., list[int]], done: str
) -> tuple[Database, Settings, list[int]]:
    settings = current_settings()
    parsed = [parse_id(text) for text in targets]
    batch_ids = [number for kind, number in parsed if kind == "b"]
    job_ids = [number for kind, number in parsed if kind == "j"]
    database = open_database(settings)
    require_batches(database, batch_ids)
    require_jobs(database, job_ids)
    with database.write() as session:
        changed = change(session, batch_ids=batch_ids, job_ids=job_ids)
    for job_id in changed:
        click.echo(format_job_id(job_id))
    click.echo(f"{len(changed)} jobs {done}", err=True)
    return database, settings, changed
