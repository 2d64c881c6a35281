"""``prune`` and ``db upgrade``: maintain what is stored."""

from __future__ import annotations

import sys

import click

from qbatch.commands.context import connect, current_settings, open_database
from qbatch.commands.parameter_types import Age
from qbatch.commands.shared_options import format_options


@click.command()
@click.option(
    "--older-than", type=Age(), required=True, help="Remove batches that finished longer ago than this: 30d, 12h."
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
@format_options("table", "json", "csv")
def prune(older_than: float, dry_run: bool, format_: str) -> None:
    """Remove old batches with their logs, damaged checkpoints, unused baseline outputs and old file checksums.

    Checkpoints are kept, and so are jobs whose results are reused by jobs that stay. Workers may run meanwhile.
    """
    from qbatch.views.formats import render
    from qbatch.views.listings import removal_columns
    from qbatch.worker.housekeeping.prune import prune as prune_old

    settings = current_settings()
    pruned = prune_old(open_database(settings), settings, older_than, dry_run=dry_run)
    click.echo(render([kind.to_json() for kind in pruned], removal_columns(done=not dry_run), format_))
    problems = [problem for kind in pruned for problem in kind.problems]
    for problem in problems:
        click.echo(problem, err=True)
    if dry_run:
        click.echo("nothing was removed: this was a dry run", err=True)
    sys.exit(1 if problems else 0)


@click.group()
def db() -> None:
    """Maintain the database."""


@db.command()
def upgrade() -> None:
    """Upgrade the database to the schema of this version."""
    from qbatch.models_db.schema import upgrade as upgrade_schema

    database = connect(current_settings())
    upgrade_schema(database)
    click.echo(f"{database.place} now has schema {database.schema_version()}", err=True)
