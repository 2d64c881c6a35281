"""``cancel`` and ``retry``: change the state of jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from qbatch.commands.context import current_settings, open_database
from qbatch.commands.sending import send
from qbatch.commands.shared_options import target_arguments
from qbatch.commands.targets import find_targets
from qbatch.core.domain import format_job_id
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from qbatch.models_db.session import Database


@click.command()
@target_arguments
def cancel(targets: Sequence[str]) -> None:
    """Cancel batches or jobs. Running jobs are stopped; finished jobs stay as they are."""
    from qbatch.models_db.bundle_mates import jobs_running_on, running_workers
    from qbatch.models_db.jobs import cancel as cancel_jobs

    mates: list[int] = []

    def cancel_and_look(session: Session, *, batch_ids: Sequence[int], job_ids: Sequence[int]) -> list[int]:
        workers = running_workers(session, batch_ids=batch_ids, job_ids=job_ids)
        cancelled = cancel_jobs(session, batch_ids=batch_ids, job_ids=job_ids)
        mates.extend(jobs_running_on(session, workers))
        return cancelled

    _change(targets, cancel_and_look, "cancelled", why_none="all had ended")
    if mates:
        names = ", ".join(map(format_job_id, mates))
        click.echo(
            f"{names} ran in the same process, which is ended: started again, without counting a failure", err=True
        )


@click.command()
@target_arguments
def retry(targets: Sequence[str]) -> None:
    """Queue failed and cancelled jobs again."""
    from qbatch.models_db.jobs import retry as retry_jobs

    database, settings, changed = _change(
        targets, retry_jobs, "queued again", why_none="none had failed or been cancelled"
    )
    if changed:
        hint = send(database, settings)
        if hint is not None:
            click.echo(hint, err=True)


def _change(
    targets: Sequence[str], change: Callable[..., list[int]], done: str, *, why_none: str
) -> tuple[Database, Settings, list[int]]:
    settings = current_settings()
    database = open_database(settings)
    found = find_targets(database, targets)
    with database.write() as session:
        changed = change(session, batch_ids=found.batch_ids, job_ids=found.job_ids)
    for job_id in changed:
        click.echo(format_job_id(job_id))
    why = "" if changed else f": {why_none}"
    click.echo(f"{len(changed)} job{'' if len(changed) == 1 else 's'} {done}{why}", err=True)
    return database, settings, changed
