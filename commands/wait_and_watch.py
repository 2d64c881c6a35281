"""``wait`` and ``watch``, and how other commands wait for batches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO

import click

from qbatch.commands.context import INTERRUPTED, current_settings, open_database
from qbatch.commands.on_end import on_end_option, run_on_end
from qbatch.commands.parameter_types import Duration
from qbatch.commands.shared_options import batch_arguments
from qbatch.commands.targets import find_batches
from qbatch.core.domain import JobState, format_batch_id
from qbatch.core.errors import DatabaseUnreachable
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.core.watched import Snapshot
    from qbatch.models_db.session import Database

# A worker's imports take up to 20 s on a cold machine, and several workers share its cores.
_STARTS_WITHIN_S = 120.0


@click.command()
@batch_arguments(required=True)
@click.option("--timeout", type=Duration(), help="Stop waiting after this long and exit with 4: 30s, 10m, 2h.")
@on_end_option
def wait(batches: Sequence[str], timeout: float | None, on_end: str | None) -> None:
    """Wait until every job of the batches has finished."""
    settings = current_settings()
    database = open_database(settings)
    ids = find_batches(database, batches)
    try:
        all_succeeded = wait_for_batches(database, settings, ids, timeout_s=timeout, on_end=on_end)
    except KeyboardInterrupt:
        leave_running(database, settings, ids)
    sys.exit(0 if all_succeeded else 1)


@click.command()
@batch_arguments()
def watch(batches: Sequence[str]) -> None:
    """Show what runs until every job of the batches has finished. Without BATCH: of all open batches, also those that
    are submitted meanwhile.

    On a terminal: a line for each running job, the GPUs, and the failures as they happen. Elsewhere plain lines. Ctrl-C
    ends only the watching.
    """
    from qbatch.views.live import describe_end

    settings = current_settings()
    database = open_database(settings)
    ids = find_batches(database, batches)
    try:
        snapshot = follow_batches(database, settings, ids, stream=sys.stdout)
    except KeyboardInterrupt:
        leave_running(database, settings, ids)
    if snapshot.batches:
        click.echo(describe_end(snapshot))
    else:
        click.echo("nothing is queued or running", err=True)
    sys.exit(0 if snapshot.have_succeeded else 1)


def wait_for_batches(
    database: Database,
    settings: Settings,
    batch_ids: Sequence[int],
    *,
    timeout_s: float | None = None,
    quiet: bool = False,
    on_poll: Callable[[], None] | None = None,
    on_end: str | None = None,
) -> bool:
    """Show progress until the batches have finished, then run ``on_end``. Returns whether all jobs succeeded."""
    snapshot = follow_batches(database, settings, batch_ids, timeout_s=timeout_s, quiet=quiet, on_poll=on_poll)
    if on_end is not None:
        run_on_end(on_end, database, settings, batch_ids)
    return snapshot.have_succeeded


def follow_batches(
    database: Database,
    settings: Settings,
    batch_ids: Sequence[int],
    *,
    timeout_s: float | None = None,
    quiet: bool = False,
    on_poll: Callable[[], None] | None = None,
    stream: TextIO | None = None,
) -> Snapshot:
    """Show progress on ``stream``, standard error by default, until the batches have finished. Returns the last look.

    ``on_poll`` is called often, by a command that has just started the stack and supervises it.
    """
    from qbatch.models_db.watching import Watcher
    from qbatch.scheduler.wait import wait as wait_for
    from qbatch.views.live import LiveProgress

    with LiveProgress(
        quiet=quiet, stream=stream, why_no_worker=_WhyNoWorker(settings, starts_stack=on_poll is not None)
    ) as progress:
        return wait_for(
            database,
            Watcher(batch_ids, lease_s=settings.lease_s, judges=not quiet),
            timeout_s=timeout_s,
            on_update=progress.update,
            on_silence=progress.note_silence,
            on_poll=on_poll or _nothing,
        )


def leave_running(database: Database, settings: Settings, batch_ids: Sequence[int]) -> NoReturn:
    """Say what goes on although nobody waits for it any more, and exit as after Ctrl-C."""
    click.echo(what_goes_on(database, settings, batch_ids), err=True)
    sys.exit(INTERRUPTED)


def what_goes_on(database: Database, settings: Settings, batch_ids: Sequence[int]) -> str:
    """``no longer watching; b1 goes on (2 running, 3 queued): …``"""
    from qbatch.scheduler.stack_lock import stack_is_running

    ids = [format_batch_id(batch_id) for batch_id in batch_ids]
    what, words, one = ", ".join(ids) or "all that is open", " ".join(["", *ids]), len(ids) < 2
    ways = f"`qbatch watch{words}` shows {'it' if one else 'them'} again"
    ways += f", `qbatch cancel{words}` cancels {'it' if one else 'them'}" if ids else ""
    does = "goes on" if one else "go on"
    if settings.is_embedded and not stack_is_running(settings):
        does, ways = f"{'stays' if one else 'stay'} queued", f"no stack is running, and `qbatch up` starts one; {ways}"
    return f"no longer watching; {what} {does}{_how_much(database, batch_ids)}: {ways}"


def _how_much(database: Database, batch_ids: Sequence[int]) -> str:
    from qbatch.models_db.listing import count_states

    try:
        with database.read() as session:
            counts = count_states(session, batch_ids)
    except DatabaseUnreachable:  # whoever presses Ctrl-C because of that knows it
        return ""
    left = [f"{counts[state]} {state}" for state in (JobState.RUNNING, JobState.QUEUED) if state in counts]
    return f" ({', '.join(left)})" if left else ""


class _WhyNoWorker:
    """Why no worker is live: those of a stack that has just started need a while, and are listed only then."""

    def __init__(self, settings: Settings, *, starts_stack: bool) -> None:
        self._settings = settings
        self._starts_stack = starts_stack
        self._since: float | None = None

    def __call__(self) -> str:
        from qbatch.scheduler.stack_lock import stack_is_running
        from qbatch.views.live import NO_WORKER, STARTING

        is_started = self._starts_stack or (self._settings.is_embedded and stack_is_running(self._settings))
        if not is_started:
            self._since = None
            return NO_WORKER
        self._since = time.monotonic() if self._since is None else self._since
        is_late = time.monotonic() - self._since > _STARTS_WITHIN_S
        return f"{STARTING}; see {self._settings.home / 'logs' / 'workers.log'}" if is_late else STARTING


def _nothing() -> None:
    return None
