"""What the scheduler and the workers do within a transaction, each function as they call it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState
from qbatch.core.errors import DeviceError
from qbatch.core.retry_policy import RetryLimits
from qbatch.core.settings import Settings
from qbatch.models_db import jobs, workers
from qbatch.models_db.health import health
from qbatch.models_db.listing import list_batches
from qbatch.models_db.results import find_results
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job, Worker
from qbatch.scheduler.dispatch import top_up
from qbatch.scheduler.reconcile import shorten_future_times

_MOST_REPEATS = 12

LEASE_S = 6 * 3600.0
"""Long enough for the live workers to stay live during the benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedTransaction:
    """One thing that was timed: the least of several runs, in seconds. ``cpu_s`` is that of this process alone."""

    name: str
    wall_s: float
    cpu_s: float


class _Unsent:
    """A broker that takes every message."""

    def send(self, dispatches: Iterable[Any]) -> None:
        self.sent = list(dispatches)


def time_transactions(database: Database, folder: Path, large: int, repeats: int) -> Iterator[TimedTransaction]:
    settings = Settings(home=folder, storage=folder, cache=folder, lease_s=LEASE_S)
    _nothing_under_way(database)
    broker: Any = _Unsent()
    yield _timed("fill the empty window", 1, lambda: top_up(database, broker, settings))
    yield _timed("a tick, window full", repeats, lambda: top_up(database, broker, settings))
    freed = partial(_claim_a_bundle, database)
    yield _timed("a tick, one slot freed", repeats, lambda: top_up(database, broker, settings), before=freed)
    yield _timed("shorten_future_times", repeats, lambda: shorten_future_times(database, settings))
    for name, ask in _questions(large).items():
        yield _timed(name, repeats, partial(_rolled_back, database, ask))
    with _running_job(database) as fail:
        yield _timed("a device error is recorded", repeats, fail)


def _questions(large: int) -> dict[str, Callable[[Session], object]]:
    return {
        "expire": lambda session: jobs.expire(session, limits=RetryLimits(backoff_s=1.0, max_failures=3)),
        "give_up_too_large": lambda session: jobs.give_up_too_large(session, LEASE_S),
        "any_waits_for_space": jobs.any_waits_for_space,
        "list_batches, all": list_batches,
        "list_batches, the large one": lambda session: list_batches(session, [large]),
        "health": lambda session: health(session, LEASE_S),
        "results of the large batch, 50": lambda session: find_results(session, batch_ids=[large], limit=50),
        "results by KL, 50": lambda session: find_results(session, sort="kl_mean", limit=50),
        "results by model, 50": lambda session: find_results(session, sort="model", limit=50),
        "large batch by KL, 50": lambda session: find_results(session, batch_ids=[large], sort="kl_mean", limit=50),
    }


def _timed(
    name: str, repeats: int, action: Callable[[], object], before: Callable[[], object] | None = None
) -> TimedTransaction:
    """What takes milliseconds is repeated more often, because the machine may be busy with other things."""
    wall_s: list[float] = []
    cpu_s: list[float] = []
    while len(wall_s) < repeats or (repeats > 1 and len(wall_s) < _MOST_REPEATS and sum(wall_s) < 1):
        if before is not None:
            before()
        began, cpu_began = time.perf_counter(), time.process_time()
        action()
        wall_s.append(time.perf_counter() - began)
        cpu_s.append(time.process_time() - cpu_began)
    return TimedTransaction(name=name, wall_s=min(wall_s), cpu_s=min(cpu_s))


def _rolled_back(database: Database, ask: Callable[[Session], object]) -> None:
    with Session(database.engine) as session, session.begin() as transaction:
        ask(session)
        transaction.rollback()


def _claim_a_bundle(database: Database) -> None:
    """As a worker does: a bundle leaves the window."""
    with database.write() as session:
        bundle = session.scalars(select(Job.bundle).where(Job.dispatch_id > "", Job.state == JobState.QUEUED)).first()
        ids = session.scalars(select(Job.id).where(Job.bundle == bundle, Job.dispatch_id > "")).all()
        worker = workers.live(session, LEASE_S)[-1]
        jobs.claim(session, ids, worker.id, LEASE_S)


@contextmanager
def _running_job(database: Database) -> Iterator[Callable[[], None]]:
    with database.read() as session:
        job_id, attempt = session.execute(
            select(Job.id, Job.attempt).where(Job.state == JobState.RUNNING).limit(1)
        ).one()

    def fail(session: Session) -> None:
        error = DeviceError("the device reported an error")
        jobs.fail(session, (job_id, attempt), error, limits=RetryLimits(backoff_s=1.0, max_failures=3), lease_s=LEASE_S)

    yield lambda: _rolled_back(database, fail)


def _nothing_under_way(database: Database) -> None:
    """Undo what an earlier run of the benchmark has dispatched and claimed; its live workers live again."""
    with database.write() as session:
        session.execute(
            text(
                "UPDATE jobs SET state = 'queued', dispatch_id = NULL, queue = NULL, worker_id = NULL,"
                " lease_expires_at = NULL WHERE state = 'running' OR (state = 'queued' AND dispatch_id IS NOT NULL)"
            )
        )
        for worker in session.scalars(select(Worker).where(Worker.state == "ready")):
            workers.beat(session, worker.id)
