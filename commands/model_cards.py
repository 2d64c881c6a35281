"""``card``: write the model cards of checkpoints anew."""

from __future__ import annotations

from collections.abc import Sequence

import click

from qbatch.commands.context import current_settings, open_database, require_batches, require_jobs
from qbatch.core.domain import parse_id


@click.command()
@click.argument("targets", nargs=-1, metavar="[BATCH|JOB]...")
@click.option("--overwrite", is_flag=True, help="Also replace cards that qbatch did not write.")
def card(targets: Sequence[str], overwrite: bool) -> None:
    """Write the model cards (README.md) of checkpoints from the database, without arguments of all of them.

    Workers do that after each measurement. A card is not part of what `verify` checks.
    """
    from qbatch.models_db.batches import jobs_with_checkpoints
    from qbatch.worker.serving.cards import rewrite_cards

    settings = current_settings()
    parsed = [parse_id(text) for text in targets]
    batch_ids = [number for kind, number in parsed if kind == "b"]
    job_ids = [number for kind, number in parsed if kind == "j"]
    database = open_database(settings)
    require_batches(database, batch_ids)
    require_jobs(database, job_ids)
    with database.read() as session:
        if batch_ids or not targets:
            job_ids += jobs_with_checkpoints(session, batch_ids)
    for line in rewrite_cards(database, settings, job_ids, overwrite=overwrite):
        click.echo(line)
