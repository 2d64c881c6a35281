"""``results``, ``compare`` and ``show``: what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qbatch.commands.completion import complete_column, complete_model
from qbatch.commands.context import current_settings, open_database
from qbatch.commands.parameter_types import Bits
from qbatch.commands.shared_options import batch_arguments, compare_options, format_options, target_arguments
from qbatch.commands.targets import find_batches, find_targets
from qbatch.core.domain import LARGEST_ID, job_number
from qbatch.core.job_log import job_log
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.core.measured.result_row import ResultRow
    from qbatch.models_db.job_record import JobRecord


@click.command()
@batch_arguments("jobs")
@click.option("--model", shell_complete=complete_model, help="Only models whose name contains this text.")
@click.option("--bits", type=Bits(), default=(), help="Only these bit widths, separated by commas: 4,8.")
@click.option(
    "--sort",
    metavar="COLUMN",
    shell_complete=complete_column,
    help="Sort by a column of the JSON output; -COLUMN sorts descending.",
)
@click.option("--limit", type=click.IntRange(1, LARGEST_ID), metavar="INTEGER", help="Show at most this many rows.")
@format_options("table", "json", "csv", "quiet")
def results(
    batches: Sequence[str], model: str | None, bits: tuple[int, ...], sort: str | None, limit: int | None, format_: str
) -> None:
    """Show the measurements of each quantized model next to those of its baseline."""
    from qbatch.models_db.results import find_results

    settings = current_settings()
    database = open_database(settings)
    ids = find_batches(database, batches)
    with database.read() as session:
        rows = find_results(session, batch_ids=ids, model=model, bits=bits, sort=sort, limit=limit)
    print_results(settings, rows, format_)


@click.command()
@compare_options
@format_options("table", "json", "csv")
def compare(batches: Sequence[str], model: str | None, by: str, format_: str, **preference: Any) -> None:
    """Compare each model's quantization schemes and recommend one.

    Results of different protocols or devices are listed separately. If you set no limit on quality, a default limit
    is used and shown.
    """
    from qbatch.models_db.results import find_results
    from qbatch.views.compare import comparison
    from qbatch.views.comparison import Preference

    settings = current_settings()
    database = open_database(settings)
    ids = find_batches(database, batches)
    with database.read() as session:
        rows = find_results(session, batch_ids=ids, model=model)
    click.echo(comparison(placed(settings, rows), Preference(**preference), by=by, format=format_))


@click.command()
@target_arguments
@format_options("table", "json", "csv")
def show(targets: Sequence[str], format_: str) -> None:
    """Show everything about a job, or about each job of a batch: attempts, scheme, protocol, measurements, audit, and
    what limits its speed."""
    from qbatch.models_db.database_id import database_id
    from qbatch.models_db.job_pages import first_jobs
    from qbatch.models_db.job_record import whole_jobs
    from qbatch.views.formats import render
    from qbatch.views.job_details import show_jobs

    settings = current_settings()
    database = open_database(settings)
    chosen = find_targets(database, targets)
    with database.read() as session:
        ids = list(first_jobs(session, LARGEST_ID, batch_ids=chosen.batch_ids)) if chosen.batch_ids else []
        found = whole_jobs(session, list(dict.fromkeys([*ids, *chosen.job_ids])))
        folder = settings.logs_of(database_id(session))
    rows = placed(settings, [job.row for job in found])
    records = [_with_log(job.record, folder) for job in found]
    whole = [replace(job, row=row, record=record) for job, row, record in zip(found, rows, records, strict=True)]
    click.echo(show_jobs(whole) if format_ == "table" else render([job.to_json() for job in whole], (), format_))


def _with_log(record: JobRecord, folder: Path) -> JobRecord:
    """The record with the path of the newest log, if a worker has begun the job."""
    log_path = job_log(folder, job_number(record.job_id), record.attempt)
    return replace(record, log_path=str(log_path) if record.attempts else None)


def print_results(settings: Settings, rows: Sequence[ResultRow], format_: str) -> None:
    """Print rows in the requested format."""
    from qbatch.views.formats import render
    from qbatch.views.results_table import results_table

    rows = placed(settings, rows)
    if format_ == "quiet":
        click.echo("".join(f"{row.job_id}\n" for row in rows), nl=False)
        return
    click.echo(results_table(rows) if format_ == "table" else render([row.to_json() for row in rows], (), format_))


def placed(settings: Settings, rows: Sequence[ResultRow]) -> list[ResultRow]:
    """With the whole paths of checkpoints: they are stored relative to the storage, which may be mounted elsewhere on
    each machine."""
    paths = [None if row.checkpoint_path is None else str(settings.storage / row.checkpoint_path) for row in rows]
    return [replace(row, checkpoint_path=path) for row, path in zip(rows, paths, strict=True)]
