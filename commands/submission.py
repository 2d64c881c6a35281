"""``submit`` and ``run``: store a batch; with ``run``, also work on it here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from qbatch.commands.context import INTERRUPTED, current_settings, open_database
from qbatch.commands.measurements import print_results, with_absolute_paths
from qbatch.commands.on_end import on_end_option
from qbatch.commands.planning_ahead import show_plan
from qbatch.commands.progress_bar import progress_bar
from qbatch.commands.request import read_submission
from qbatch.commands.request_options import submit_options
from qbatch.commands.sending import send
from qbatch.commands.services import interrupt_on_signals, local_stack
from qbatch.commands.wait_and_watch import leave_running, wait_for_batches, what_goes_on
from qbatch.core.control_characters import escape_controls
from qbatch.core.domain import DeviceKind, format_batch_id
from qbatch.core.errors import StackNotRunning, UsageError
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.models_db.session import Database
    from qbatch.scheduler.local_stack import LocalStack
    from qbatch.scheduler.submit import Receipt, Submission


@click.command()
@submit_options
@click.option("--wait", "wait_", is_flag=True, help="Wait until every job has finished.")
@click.option("--dry-run", is_flag=True, help="Store nothing, and print what `qbatch plan` does.")
@on_end_option
def submit(format_: str, wait_: bool, dry_run: bool, on_end: str | None, **options: Any) -> None:
    """Store a batch of quantize-and-benchmark jobs for each MODEL and print its id."""
    if dry_run:
        if wait_:
            raise UsageError("--dry-run stores nothing that --wait could wait for")
        show_plan(options, format_)
        return
    if on_end is not None and not wait_:
        raise UsageError("--on-end needs --wait: without it, no process is left to run the command")
    settings = current_settings()
    submission = read_submission(settings, options, quiet=format_ == "quiet")
    database = open_database(settings)
    receipt = _store(database, settings, submission, quiet=format_ == "quiet")
    try:
        if not wait_:
            hint = _send(database, settings, receipt)
            if hint is not None:
                click.echo(hint, err=True)
            _print_receipt(receipt, format_)
            return
        all_succeeded = _wait_for_stored(database, settings, receipt, format_, on_end=on_end)
    except KeyboardInterrupt:
        leave_running(database, settings, [receipt.batch_id])
    _print_outcome(database, settings, receipt, format_)
    sys.exit(0 if all_succeeded else 1)


def _wait_for_stored(
    database: Database, settings: Settings, receipt: Receipt, format_: str, *, on_end: str | None
) -> bool:
    """Send a batch, and wait for it. Returns whether all jobs succeeded. Raises StackNotRunning."""
    hint = _send(database, settings, receipt)
    if hint is not None:
        click.echo(hint, err=True)
        _print_receipt(receipt, format_)
        raise StackNotRunning(_nobody_works_on(receipt))
    click.echo(f"{format_batch_id(receipt.batch_id)}: {receipt.jobs} jobs", err=True)
    return wait_for_batches(database, settings, [receipt.batch_id], quiet=format_ == "quiet", on_end=on_end)


@click.command()
@submit_options
@on_end_option
def run(format_: str, on_end: str | None, **options: Any) -> None:
    """Submit a batch for each MODEL, run it here, and print the results.

    Starts the embedded stack (Redis, scheduler, workers) unless one is already running or QBATCH_BROKER_URL is
    set. Stops what it started when the batch has finished.
    """
    from qbatch.scheduler.stack_lock import stack_is_running

    settings = current_settings()
    submission = read_submission(settings, options, quiet=format_ == "quiet")
    interrupt_on_signals()
    if not settings.is_embedded or stack_is_running(settings):
        sys.exit(_run(settings, submission, format_, stack=None, on_end=on_end))
    with local_stack(settings, device=DeviceKind(options["device"])) as stack:
        code = _run(settings, submission, format_, stack=stack, on_end=on_end)
    sys.exit(code)


def _run(
    settings: Settings, submission: Submission, format_: str, *, stack: LocalStack | None, on_end: str | None
) -> int:
    database = open_database(settings)
    receipt = _store(database, settings, submission, quiet=format_ == "quiet")
    try:
        quiet = format_ == "quiet"
        all_succeeded = _run_stored(database, settings, receipt, quiet=quiet, stack=stack, on_end=on_end)
    except KeyboardInterrupt:
        batch = format_batch_id(receipt.batch_id)
        stopped = f"stopped; {batch} is stored: `qbatch up` continues it, `qbatch cancel {batch}` cancels it"
        click.echo(what_goes_on(database, settings, [receipt.batch_id]) if stack is None else stopped, err=True)
        return INTERRUPTED
    _print_outcome(database, settings, receipt, format_)
    return 0 if all_succeeded else 1


def _run_stored(
    database: Database,
    settings: Settings,
    receipt: Receipt,
    *,
    quiet: bool,
    stack: LocalStack | None,
    on_end: str | None,
) -> bool:
    """Send a batch to the stack that runs, or to the one that was just started, and wait for it. Returns whether all
    jobs succeeded. Raises StackNotRunning."""
    click.echo(_stored(receipt), err=True)
    hint = _send(database, settings, receipt)
    if hint is not None and stack is None:
        click.echo(hint, err=True)
        raise StackNotRunning(_nobody_works_on(receipt))
    supervise = stack.supervise if stack is not None else None
    return wait_for_batches(database, settings, [receipt.batch_id], quiet=quiet, on_poll=supervise, on_end=on_end)


def _store(database: Database, settings: Settings, submission: Submission, *, quiet: bool) -> Receipt:
    from qbatch.scheduler.submit import submit as store

    with progress_bar("storing", len(submission.sources), quiet=quiet) as on_progress:
        receipt = store(database, settings, submission, on_progress)
    if receipt.outdated:
        click.echo(
            f"{receipt.outdated} jobs are measured again: qbatch 0.1.0, which measured them before, identified models "
            "by the sizes and modification times of their files, not by their content",
            err=True,
        )
    for warning, models in receipt.warnings.items():
        click.echo(escape_controls(warning if models == 1 else f"{models} models: {warning}"), err=True)
    return receipt


def _send(database: Database, settings: Settings, receipt: Receipt) -> str | None:
    """Send a batch to the workers. If nothing can run it now, return a sentence that says what will."""
    return send(database, settings) if _has_work(receipt) else None


def _nobody_works_on(receipt: Receipt) -> str:
    batch = format_batch_id(receipt.batch_id)
    return f"{batch} is stored, but nothing is running that could work on it: not waiting for it"


def _has_work(receipt: Receipt) -> bool:
    return receipt.answered < receipt.jobs


def _print_receipt(receipt: Receipt, format_: str) -> None:
    batch = format_batch_id(receipt.batch_id)
    if format_ == "quiet":
        click.echo(batch)
    elif format_ == "json":
        import json

        click.echo(
            json.dumps(
                {
                    "batch_id": batch,
                    "jobs": receipt.jobs,
                    "answered": receipt.answered,
                    "live_workers": receipt.live_workers,
                    "outdated": receipt.outdated,
                    "undecided": receipt.undecided,
                    "warnings": list(receipt.warnings),
                }
            )
        )
    else:
        click.echo(_stored(receipt))


def _stored(receipt: Receipt) -> str:
    """``b1: 6 jobs, 2 answered by earlier results; workers look for those of 4 more``. Nothing is said of earlier
    results where only a worker, which has the files, can find any."""
    stored = f"{format_batch_id(receipt.batch_id)}: {receipt.jobs} jobs"
    if not receipt.answered:
        return stored
    more = min(receipt.undecided, receipt.jobs - receipt.answered)
    elsewhere = f"; workers look for those of {more} more" if more else ""
    return f"{stored}, {receipt.answered} answered by earlier results{elsewhere}"


def _print_outcome(database: Database, settings: Settings, receipt: Receipt, format_: str) -> None:
    from qbatch.models_db.question_answers import with_answers
    from qbatch.models_db.results import find_results
    from qbatch.views.choices import told_apart_by_answers
    from qbatch.views.comparison import Preference
    from qbatch.views.results_table import ResultsScreen

    if format_ == "quiet":
        click.echo(format_batch_id(receipt.batch_id))
        return
    with database.read() as session:
        rows = find_results(session, batch_ids=[receipt.batch_id])
        rows = with_answers(session, rows, told_apart_by_answers(rows, Preference()) if format_ == "table" else ())
    print_results(ResultsScreen(rows=with_absolute_paths(settings, rows)), format_)
