"""``--on-end``: a command of the user's that runs when batches have finished."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from qbatch.core.domain import JobState, format_batch_id
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.models_db.session import Database

on_end_option = click.option(
    "--on-end",
    metavar="COMMAND",
    help="When every job has finished, run this in a shell. BATCHES holds the ids of the batches, and SUCCEEDED, "
    "FAILED and CANCELLED the numbers of their jobs that ended so.",
)


def run_on_end(command: str, database: Database, settings: Settings, batch_ids: Sequence[int]) -> None:
    """Run ``command`` in a shell and wait for it. If it fails, standard error says so; nothing else follows from it."""
    from qbatch.models_db.listing import count_states

    with database.read() as session:
        counts = count_states(session, batch_ids)
    told = {"BATCHES": " ".join(map(format_batch_id, batch_ids)), "QBATCH_HOME": str(settings.home)}
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        told[state.value.upper()] = str(counts.get(state, 0))
    # In a shell, since it is the user's own command line.
    code = subprocess.run(command, shell=True, env={**os.environ, **told}, check=False).returncode  # noqa: S602
    if code != 0:
        click.echo(f"the command of --on-end ended with exit code {code}: {command}", err=True)
