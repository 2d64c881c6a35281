"""``card``: write the model cards of checkpoints anew."""

from __future__ import annotations

from collections.abc import Sequence

import click

from qbatch.commands.completion import complete_target
from qbatch.commands.context import current_settings, open_database
from qbatch.commands.targets import find_targets


@click.command()
@click.argument("targets", nargs=-1, metavar="[BATCH|JOB]...", shell_complete=complete_target)
@click.option("--overwrite", is_flag=True, help="Also replace cards that qbatch did not write.")
def card(targets: Sequence[str], overwrite: bool) -> None:
    """Write the model cards (README.md) of checkpoints from the database. Without arguments, those of all checkpoints.

    Workers do that after each measurement. A card is not part of what `verify` checks.
    """
    from qbatch.models_db.batches import jobs_with_checkpoints
    from qbatch.worker.serving.cards import rewrite_cards

    settings = current_settings()
    database = open_database(settings)
    found = find_targets(database, targets)
    job_ids = list(found.job_ids)
    with database.read() as session:
        if found.batch_ids or not targets:
            job_ids += jobs_with_checkpoints(session, found.batch_ids)
    for line in rewrite_cards(database, settings, job_ids, overwrite=overwrite):
        click.echo(line)
