"""``report``: batches as a page that can be sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qbatch.commands.context import current_settings, open_database
from qbatch.commands.measurements import with_absolute_paths
from qbatch.commands.result_options import models_option, preference_options
from qbatch.commands.shared_options import batch_arguments
from qbatch.commands.targets import find_batches
from qbatch.core.errors import UsageError

if TYPE_CHECKING:
    from qbatch.core.settings import Settings
    from qbatch.models_db.session import Database
    from qbatch.views.report.reported_batches import ReportedBatches


@click.command()
@batch_arguments(required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    default="report.html",
    show_default=True,
    help="The file to write, in place of an older one; - is standard output.",
)
@click.option(
    "--plots",
    "plots",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also write the charts into this folder, as PNG and SVG (needs qbatch[plots]).",
)
@models_option()
@preference_options
def report(batches: Sequence[str], output: Path, plots: Path | None, models: Sequence[str], **preference: Any) -> None:
    """Write a report on batches: one HTML page that loads nothing, to be read, printed or sent.

    It says what to ship of each model and why, as `compare` does, and shows size, quality, speed, memory, energy, the
    audit, failures, and where the figures come from.
    """
    from qbatch.views.comparison import Preference
    from qbatch.views.report.report_page import report_page

    settings = current_settings()
    reported = _reported(settings, open_database(settings), batches, models)
    chosen = Preference(**preference)
    if plots is not None:
        from qbatch.views.report.plots import write_plots

        files = write_plots(reported.judged(chosen), plots)
        click.echo("".join(f"{file}\n" for file in files), nl=False, err=str(output) == "-")
    _write(report_page(reported, chosen), output)


def _reported(settings: Settings, database: Database, batches: Sequence[str], models: Sequence[str]) -> ReportedBatches:
    from importlib.metadata import version

    from qbatch.models_db.listing import list_batches
    from qbatch.models_db.reported_jobs import reported_jobs
    from qbatch.views.report.reported_batches import ReportedBatches

    ids = find_batches(database, batches)
    with database.read() as session:
        found = list_batches(session, ids)
        jobs = reported_jobs(session, ids, models=models)
    rows = with_absolute_paths(settings, [job.row for job in jobs])
    return ReportedBatches(
        batches=found,
        jobs=[replace(job, row=row) for job, row in zip(jobs, rows, strict=True)],
        made_at=datetime.now(UTC).isoformat(),
        version=version("qbatch"),
    )


def _write(page: str, output: Path) -> None:
    if str(output) == "-":
        click.echo(page, nl=False)
        return
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the report cannot be written to {output}: {error.strerror}") from error
    click.echo(str(output))
