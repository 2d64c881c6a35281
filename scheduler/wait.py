"""Wait until batches have finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from qbatch.core.domain import ENDED_STATES, JobState
from qbatch.core.errors import DatabaseRefused, DatabaseUnreachable, WaitTimeout, WrongDatabase
from qbatch.models_db.listing import count_states, list_jobs, live_workers
from qbatch.models_db.session import Database

_POLL_S = 0.5


def wait(
    database: Database,
    batch_ids: Sequence[int],
    *,
    lease_s: float,
    timeout_s: float | None,
    on_update: Callable[[list[dict[str, Any]], int], None],
    on_poll: Callable[[], None],
) -> bool:
    """Wait until every job of the batches has finished. Returns whether all succeeded.

    ``on_update`` gets the jobs and the number of live workers about twice a second; ``on_poll`` is called at each poll.
    Keeps trying while the database does not answer. Raises WaitTimeout, DatabaseRefused or WrongDatabase.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    show_at = 0.0
    while True:
        on_poll()
        states = _states(database, batch_ids)
        ended = states is not None and states <= set(ENDED_STATES)
        if ended or time.monotonic() >= show_at:
            show_at = _show(database, batch_ids, lease_s, on_update)
        if ended:
            return states == {JobState.SUCCEEDED}
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimeout(f"not all jobs finished within {timeout_s:g} s")
        time.sleep(_POLL_S)


def _states(database: Database, batch_ids: Sequence[int]) -> set[JobState] | None:
    """The set of states of these batches' jobs; None while the database does not answer."""
    try:
        with database.read() as session:
            database.require_own(session)
            return {JobState(state) for state in count_states(session, batch_ids)}
    except (DatabaseRefused, WrongDatabase):
        raise
    except DatabaseUnreachable:
        return None


def _show(
    database: Database, batch_ids: Sequence[int], lease_s: float, on_update: Callable[[list[dict[str, Any]], int], None]
) -> float:
    """Pass the jobs to ``on_update``. Returns when to do so next.

    Reading tens of thousands of jobs takes a while; the interval is chosen so that it takes a tenth of the time.
    """
    began = time.monotonic()
    try:
        with database.read() as session:
            jobs = list_jobs(session, batch_ids=batch_ids)
            workers = live_workers(session, lease_s)
    except DatabaseUnreachable:
        return began
    on_update(jobs, workers)
    return time.monotonic() + 10 * (time.monotonic() - began) - _POLL_S
