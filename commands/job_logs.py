"""``logs``: what qbatch said about a job while it worked on it."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from qbatch.commands.completion import complete_job
from qbatch.commands.context import INTERRUPTED, current_settings, open_database
from qbatch.commands.targets import find_job
from qbatch.core.control_characters import escape_controls
from qbatch.core.domain import LARGEST_ID

if TYPE_CHECKING:
    from qbatch.scheduler.job_log_tail import Follower, JobStatus


@click.command()
@click.argument("job", shell_complete=complete_job)
@click.option("-f", "--follow", is_flag=True, help="Print new lines as they come, until the job has ended.")
@click.option(
    "--attempt",
    type=click.IntRange(1, LARGEST_ID),
    metavar="INTEGER",
    help="The log of this attempt.  [default: the newest one]",
)
def logs(job: str, follow: bool, attempt: int | None) -> None:
    """Show the log of a job: its stages, warnings, and the traceback of a defect.

    Works on every machine that sees the storage and the database. What other libraries print is in the runner's log,
    which the first line names.
    """
    from qbatch.scheduler.job_log_tail import Follower, status_of

    settings = current_settings()
    database = open_database(settings)
    job_id = find_job(database, job)
    look = partial(status_of, database, settings.logs_of, job_id)
    status = look()
    if follow and not status.has_ended:
        _follow(Follower(look=look, say=_say, number=attempt))
    else:
        _show(status, attempt)


def _follow(follower: Follower) -> None:
    try:
        for text in follower.follow():
            _print(text)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _show(status: JobStatus, number: int | None) -> None:
    from qbatch.scheduler.job_log_tail import describe_end, read_log, require_attempt

    attempt = require_attempt(status, number)
    for text in read_log(status, attempt):
        _print(text)
    _say(describe_end(status, attempt))
    earlier = [str(one.attempt) for one in status.attempts if one.attempt != attempt.attempt]
    if number is None and earlier:
        _say(f"other attempts: {', '.join(earlier)} (show one with --attempt)")


def _print(text: bytes) -> None:
    # Whoever can write to the storage can write into a log.
    click.echo(escape_controls(text.decode(errors="replace"), in_lines=True), nl=False)


def _say(line: str) -> None:
    click.echo(escape_controls(line), err=True)
