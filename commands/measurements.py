"""``results``, ``compare`` and ``show``: what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qbatch.commands.context import (
    current_settings,
    open_database,
    parse_batch_ids,
    parse_job_ids,
    require_batches,
    require_jobs,
)
from qbatch.commands.parameter_types import Bits
from qbatch.commands.shared_options import compare_options, format_options
from qbatch.core.domain import LARGEST_ID, parse_id
from qbatch.core.job_log import job_log
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.core.measured.result_row import ResultRow
    from qbatch.models_db.job_record import JobRecord


@click.command()
@click.option("--batch", "batches", multiple=True, metavar="BATCH", help="Only jobs of this batch; may be repeated.")
@click.option("--model", help="Only models whose name contains this text.")
@click.option("--bits", type=Bits(), default=(), help="Only these bit widths, separated by commas: 4,8.")
@click.option("--sort", metavar="COLUMN", help="Sort by a column of the JSON output; -COLUMN sorts descending.")
@click.option("--limit", type=click.IntRange(1, LARGEST_ID), metavar="INTEGER", help="Show at most this many rows.")
@format_options("table", "json", "csv")
def results(
    batches: Sequence[str], model: str | None, bits: tuple[int, ...], sort: str | None, limit: int | None, format_: str
) -> None:
    """Show the measurements of each quantized model next to those of its baseline."""
    from qbatch.models_db.results import find_results

    ids = parse_batch_ids(batches)
    settings = current_settings()
    database = open_database(settings)
    require_batches(database, ids)
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

    ids = parse_batch_ids(batches)
    settings = current_settings()
    database = open_database(settings)
    require_batches(database, ids)
    with database.read() as session:
        rows = find_results(session, batch_ids=ids, model=model)
    click.echo(comparison(placed(settings, rows), Preference(**preference), by=by, format=format_))


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@format_options("table", "json", "csv")
def show(jobs: Sequence[str], format_: str) -> None:
    """Show everything about a job: attempts, scheme, protocol, measurements, audit, and what limits its speed."""
    from qbatch.models_db.database_id import database_id
    from qbatch.models_db.job_record import whole_jobs
    from qbatch.views.formats import render
    from qbatch.views.job_details import show_jobs

    ids = parse_job_ids(jobs)
    settings = current_settings()
    database = open_database(settings)
    require_jobs(database, ids)
    with database.read() as session:
        found = whole_jobs(session, ids)
        folder = settings.logs_of(database_id(session))
    rows = placed(settings, [job.row for job in found])
    records = [_with_log(job.record, folder) for job in found]
    whole = [replace(job, row=row, record=record) for job, row, record in zip(found, rows, records, strict=True)]
    click.echo(show_jobs(whole) if format_ == "table" else render([job.to_json() for job in whole], (), format_))


def _with_log(record: JobRecord, folder: Path) -> JobRecord:
    """With the path of its newest log; none if no worker has begun it."""
    _, job_id = parse_id(record.job_id)
    return replace(record, log_path=str(job_log(folder, job_id, record.attempt)) if record.attempts else None)


def print_results(settings: Settings, rows: Sequence[ResultRow], format_: str) -> None:
    """Print rows in the requested format."""
    from qbatch.views.formats import render
    from qbatch.views.results_table import results_table

    rows = placed(settings, rows)
    click.echo(results_table(rows) if format_ == "table" else render([row.to_json() for row in rows], (), format_))


def placed(settings: Settings, rows: Sequence[ResultRow]) -> list[ResultRow]:
    """With the whole paths of checkpoints: they are stored relative to the storage, which may be mounted elsewhere on
    each machine."""
    paths = [None if row.checkpoint_path is None else str(settings.storage / row.checkpoint_path) for row in rows]
    return [replace(row, checkpoint_path=path) for row, path in zip(rows, paths, strict=True)]
