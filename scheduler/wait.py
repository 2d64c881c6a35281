"""Wait until batches have finished."""

from __future__ import annotations

import time
from collections.abc import Callable

from qbatch.core.errors import DatabaseRefused, DatabaseUnreachable, WaitTimeout, WrongDatabase
from qbatch.core.watched import Snapshot
from qbatch.models_db.session import Database
from qbatch.models_db.watching import Watcher

_POLL_S = 0.5


def wait(
    database: Database,
    watcher: Watcher,
    *,
    timeout_s: float | None,
    on_update: Callable[[Snapshot], None],
    on_silence: Callable[[str], None],
    on_poll: Callable[[], None],
) -> Snapshot:
    """Wait until every job of the watched batches has finished. Returns the last look.

    ``on_update`` gets each look, about two a second, and ``on_poll`` is called at each poll. While the database does
    not answer, ``on_silence`` gets the reason and it is tried again. Raises WaitTimeout, DatabaseRefused or
    WrongDatabase.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    look_at = 0.0
    while True:
        on_poll()
        if time.monotonic() >= look_at:
            began = time.monotonic()
            snapshot = _look(database, watcher, on_silence)
            # Looking at tens of thousands of jobs takes a while: not more than a tenth of the time.
            look_at = time.monotonic() + 10 * (time.monotonic() - began) - _POLL_S
            if snapshot is not None:
                on_update(snapshot)
                if not snapshot.is_open:
                    return snapshot
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimeout(f"not all jobs finished within {timeout_s:g} s")
        time.sleep(_POLL_S)


def _look(database: Database, watcher: Watcher, on_silence: Callable[[str], None]) -> Snapshot | None:
    """Look at the batches once. None if the database does not answer."""
    try:
        with database.read() as session:
            database.require_own(session)
            return watcher.look(session)
    except (DatabaseRefused, WrongDatabase):
        raise
    except DatabaseUnreachable as error:
        on_silence(str(error))
        return None
