"""``wait``, and how other commands wait for batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from qbatch.commands.context import current_settings, open_database
from qbatch.commands.on_end import on_end_option, run_on_end
from qbatch.commands.parameter_types import Duration
from qbatch.commands.shared_options import batch_arguments
from qbatch.commands.targets import find_batches
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.models_db.session import Database


@click.command()
@batch_arguments(required=True)
@click.option("--timeout", type=Duration(), help="Stop waiting after this long and exit with 4: 30s, 10m, 2h.")
@on_end_option
def wait(batches: Sequence[str], timeout: float | None, on_end: str | None) -> None:
    """Wait until every job of the batches has finished."""
    settings = current_settings()
    database = open_database(settings)
    ids = find_batches(database, batches)
    sys.exit(0 if wait_for_batches(database, settings, ids, timeout_s=timeout, on_end=on_end) else 1)


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
    from qbatch.scheduler.wait import wait as wait_for
    from qbatch.views.live import LiveProgress

    # Whoever supervises the stack has just started it: nobody needs to be told to start a worker.
    with LiveProgress(quiet=quiet, starts_workers=on_poll is not None) as progress:
        all_succeeded = wait_for(
            database,
            batch_ids,
            lease_s=settings.lease_s,
            timeout_s=timeout_s,
            on_update=progress.update,
            on_poll=on_poll or _nothing,
        )
    if on_end is not None:
        run_on_end(on_end, database, settings, batch_ids)
    return all_succeeded


def _nothing() -> None:
    return None
