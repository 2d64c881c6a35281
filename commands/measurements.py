"""``results``, ``compare``, ``diff`` and ``show``: what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qbatch.commands.completion import complete_batch
from qbatch.commands.context import current_settings, open_database
from qbatch.commands.parameter_types import joined
from qbatch.commands.result_options import (
    compare_options,
    filter_options,
    layout_options,
    models_option,
    read_filter,
)
from qbatch.commands.shared_options import batch_arguments, format_options, limit_option, page_limit, target_arguments
from qbatch.commands.targets import NO_BATCH, find_batches, find_targets
from qbatch.core.domain import LARGEST_ID, format_batch_id, job_number
from qbatch.core.job_log import job_log
from qbatch.core.settings import Settings
from qbatch.core.storage import missing_checkpoints

if TYPE_CHECKING:
    from qbatch.core.measured.result_row import ResultRow
    from qbatch.models_db.job_record import JobRecord
    from qbatch.views.results_table import ResultsScreen

# More fill several screens, each job having half of one.
_FEW_JOBS = 4


@click.command()
@batch_arguments("jobs")
@filter_options
@layout_options
@format_options("table", "json", "csv", "md", "quiet")
def results(batches: Sequence[str], sort: str | None, limit: int | None, format_: str, **options: Any) -> None:
    """Show the measurements of each quantized model next to those of its baseline.

    A mark shows what `compare` recommends of each model, within --max-kl, --max-weights-bytes and --min-tokens-per-s if
    they are given. A baseline that a filter hides is still what the others are compared with.
    """
    from qbatch.models_db.question_answers import with_answers
    from qbatch.models_db.results import find_others, find_results
    from qbatch.views.choices import told_apart_by_answers
    from qbatch.views.comparison import Preference
    from qbatch.views.results_table import ResultsScreen, TableLayout

    settings = current_settings()
    database = open_database(settings)
    ids, only = find_batches(database, batches), read_filter(options)
    limits = {name: options[name] for name in ("max_kl", "max_weights_bytes", "min_tokens_per_s")}
    preference = Preference(**limits)
    with database.read() as session:
        rows = find_results(session, batch_ids=ids, only=only, sort=sort, limit=limit)
        has_hidden, has_marks = limit is not None or not only.hides_nothing, format_ in ("table", "md")
        others = find_others(session, rows) if has_hidden and has_marks else []
        alike = told_apart_by_answers([*others, *rows], preference) if has_marks else set()
        rows, others = with_answers(session, rows, alike), with_answers(session, others, alike)
    if format_ == "table" and not rows and not only.hides_nothing:
        click.echo("the filters let no job through: `qbatch results` without them shows all", err=True)
    elif format_ == "table" and not rows:
        click.echo(NO_BATCH, err=True)
    layout = TableLayout(
        columns=joined(options["columns"]) or None,
        is_wide=options["is_wide"],
        has_legend=options["has_legend"],
        sort=sort,
    )
    screen = ResultsScreen(
        rows=with_absolute_paths(settings, rows), others=others, preference=preference, layout=layout
    )
    print_results(screen, format_)


@click.command()
@compare_options
@limit_option("models")
@format_options("table", "json", "csv")
def compare(
    batches: Sequence[str],
    models: Sequence[str],
    by: str,
    has_legend: bool,
    limit: int | None,
    format_: str,
    **preference: Any,
) -> None:
    """Recommend a quantization scheme for each model: a line for each, and what that saves in all.

    Where there is one model, all figures of its schemes and what limits their speed follow; with --model, the main
    figures of each that it chooses. Results of different protocols or devices are listed separately. If you set no
    limit on quality, a default limit is used and shown.
    """
    from qbatch.models_db.model_pages import results_of_first_models
    from qbatch.models_db.question_answers import with_answers
    from qbatch.models_db.result_filter import ResultFilter
    from qbatch.views.compare import comparison
    from qbatch.views.comparison import Preference

    settings = current_settings()
    database = open_database(settings)
    ids = find_batches(database, batches)
    limit = page_limit(limit, format_)
    with database.read() as session:
        page = results_of_first_models(session, limit, batch_ids=ids, only=ResultFilter(models=models))
        rows = with_absolute_paths(settings, with_answers(session, page.rows))
    chosen = Preference(**preference)
    if format_ == "table" and not rows and not models:
        click.echo(NO_BATCH, err=True)
    click.echo(comparison(rows, chosen, by=by, format=format_, in_full=bool(models), has_legend=has_legend))
    if page.has_more:
        click.echo(f"these are the first {limit} models; a larger --limit shows more", err=True)


@click.command()
@click.argument("batches", nargs=-1, required=True, metavar="BATCH BATCH", shell_complete=complete_batch)
@models_option()
@format_options("table", "json", "csv")
def diff(batches: Sequence[str], models: Sequence[str], format_: str) -> None:
    """Say what is faster, slower, better or worse in the second batch than in the first.

    Each model and scheme of both is compared in what both measured, under the same protocol on the same kind of device.
    A difference counts if it is larger than the measured noise. A difference in speed of more than 10 % that the rounds
    do not confirm is uncertain.
    """
    from qbatch.models_db.result_filter import ResultFilter
    from qbatch.models_db.results import find_results
    from qbatch.views.batch_diff import batch_diff

    if len(batches) != 2:
        raise click.UsageError(f"diff compares two batches, not {len(batches)}: `qbatch diff b11 b12`")
    database = open_database(current_settings())
    ids = [find_batches(database, [word])[0] for word in batches]
    only = ResultFilter(models=models)
    with database.read() as session:
        before, after = (find_results(session, batch_ids=[batch_id], only=only) for batch_id in ids)
    click.echo(batch_diff(before, after, format_))


@click.command()
@target_arguments
@click.option("--all", "in_full", is_flag=True, help="Show everything, as JSON and CSV do anyway.")
@format_options("table", "json", "csv")
def show(targets: Sequence[str], in_full: bool, format_: str) -> None:
    """Show a job, or each job of a batch: how it went, its figures beside the baseline's, and what limits its speed.

    With --all also its source, scheme, protocol, and versions, the coverage audit, and all that was measured.
    """
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
    rows = with_absolute_paths(settings, [job.row for job in found])
    records = [_with_log(job.record, folder) for job in found]
    whole = [replace(job, row=row, record=record) for job, row, record in zip(found, rows, records, strict=True)]
    data = [job.to_json() for job in whole]
    click.echo(show_jobs(whole, in_full=in_full) if format_ == "table" else render(data, (), format_))
    if format_ == "table" and len(ids) > _FEW_JOBS:
        batches = " ".join(map(format_batch_id, chosen.batch_ids))
        click.echo(f"`qbatch results {batches}` shows these {len(ids)} jobs in one table", err=True)


def _with_log(record: JobRecord, folder: Path) -> JobRecord:
    """The record with the path of the newest log, if a worker has begun the job."""
    log_path = job_log(folder, job_number(record.job_id), record.attempt)
    return replace(record, log_path=str(log_path) if record.attempts else None)


def print_results(screen: ResultsScreen, format_: str) -> None:
    """Print rows in the requested format."""
    from qbatch.views.results_output import results_output

    text = results_output(screen, format_)
    if text or format_ != "quiet":
        click.echo(text)


def with_absolute_paths(settings: Settings, rows: Sequence[ResultRow]) -> list[ResultRow]:
    """``rows`` with the absolute paths of their checkpoints, as this machine sees the storage.

    Paths are stored relative to the storage. A path is left out if somebody has removed the checkpoint.
    """
    known = {row.checkpoint_path for row in rows if row.checkpoint_path is not None}
    there = known - missing_checkpoints(settings.storage, known)
    paths = [str(settings.storage / row.checkpoint_path) if row.checkpoint_path in there else None for row in rows]
    return [replace(row, checkpoint_path=path) for row, path in zip(rows, paths, strict=True)]
