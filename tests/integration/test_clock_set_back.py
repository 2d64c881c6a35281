"""The database's clock was set back by most of an hour: what it had dated ahead ends within a lease, and it is said.

As it stands then, with everything killed meanwhile: rows whose times lie in the future.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update

from qbatch.core.domain import JobState, Stage
from qbatch.core.errors import BrokerUnreachable, DiskFull, FetchError
from qbatch.core.retry_policy import RetryLimits
from qbatch.core.settings import Settings
from qbatch.models_db import jobs, leases
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.health import health
from qbatch.models_db.pauses import in_force
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job, Lease, Pause, Worker
from qbatch.models_db.workers import live
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.loop import Scheduler
from tests.rows import a_batch, a_job, a_worker, claim

AHEAD_S = 3000.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path, storage=tmp_path, cache=tmp_path, broker_url="redis://127.0.0.1:1/0",
        lease_s=1.0, heartbeat_s=0.2, scan_s=0.2, backoff_s=0.2,
    )  # fmt: skip


@pytest.fixture
def scheduler(database: Database, settings: Settings) -> Scheduler:
    return Scheduler(database, Broker(settings), settings)


def tick_until(scheduler: Scheduler, look: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline, "it did not come to pass"
        with contextlib.suppress(BrokerUnreachable):
            scheduler.tick()
        time.sleep(0.02)


def leader(database: Database) -> str | None:
    with database.read() as session:
        return health(session, 1.0, lead_s=0.6).leader


def test_the_lead_of_a_dead_scheduler_runs_out(
    database: Database, scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    with database.write() as session:
        leases.acquire(session, "scheduler", "the dead one", AHEAD_S)
    assert leader(database) is None, "nobody is said to lead"
    tick_until(scheduler, lambda: leader(database) not in (None, "the dead one"))
    (said,) = [record.getMessage() for record in caplog.records if "scheduler the dead one" in record.getMessage()]
    assert "clock was set back" in said


def test_a_leader_that_lives_with_a_longer_lease_keeps_it(database: Database) -> None:
    for _ in range(3):
        with database.write() as session:
            assert leases.acquire(session, "scheduler", "first", 60.0)
            leases.cut(session, "scheduler", 1.0)
            assert not leases.acquire(session, "scheduler", "second", 1.0)


def test_the_jobs_of_a_dead_worker_are_taken_back(
    database: Database, scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    _, ids = a_batch(database)
    worker = a_worker(database)
    claim(database, ids, worker, lease_s=AHEAD_S)
    with database.write() as session:
        session.execute(update(Worker).values(heartbeat_at=db_now(AHEAD_S)))
    tick_until(scheduler, lambda: a_job(database, ids[0]).state == JobState.QUEUED)
    with database.read() as session:
        assert live(session, 1.0) == []
    assert "clock was set back" in caplog.text


def test_a_worker_that_lives_keeps_its_lease_however_long(database: Database) -> None:
    _, ids = a_batch(database)
    claim(database, ids, a_worker(database), lease_s=AHEAD_S)
    with database.write() as session:
        assert jobs.shorten_future_times(session, lease_s=60.0, limits=RetryLimits(backoff_s=1.0, max_failures=3)) == 0


def test_the_lease_of_a_gpu_runs_out(database: Database) -> None:
    with database.write() as session:
        leases.acquire(session, "gpu:x", "the dead one", AHEAD_S)
        assert leases.cut(session, "gpu:x", 60.0) == "the dead one"
        assert not leases.acquire(session, "gpu:x", "another", 60.0)
        session.execute(update(Lease).values(expires_at=db_now(-1.0)))
    with database.write() as session:
        assert leases.cut(session, "gpu:x", 60.0) is None
        assert leases.acquire(session, "gpu:x", "another", 60.0)


def test_a_backoff_is_no_longer_than_its_failures_make_it(database: Database, scheduler: Scheduler) -> None:
    _, ids = a_batch(database)
    for token in claim(database, ids, a_worker(database)):
        with database.write() as session:
            jobs.note(session, token, work_started=True)
            jobs.fail(
                session, token, FetchError("no answer"), limits=RetryLimits(backoff_s=0.2, max_failures=9), lease_s=1.0
            )
    with database.write() as session:
        session.execute(update(Job).values(not_before=db_now(AHEAD_S)))
        session.execute(update(Job).where(Job.id == ids[1]).values(failures=5))
        session.execute(update(Job).where(Job.id == ids[2]).values(failures=30))
    # On a busy machine the first backoff is over by the end of the tick, which then asks for the broker.
    with contextlib.suppress(BrokerUnreachable):
        scheduler.tick()
    with database.read() as session:
        rows = session.execute(select(Job.not_before, db_now()).order_by(Job.id)).all()
    left_s = [(not_before - now).total_seconds() for not_before, now in rows if not_before is not None]
    assert left_s[0] < 0.2
    assert 1.0 < left_s[1] < 0.2 * 2**4
    assert left_s[2] > AHEAD_S - 60.0, "a backoff of an hour is none too long"


def test_a_pause_ends(database: Database, scheduler: Scheduler) -> None:
    """Of a storage that the scheduler does not see: nobody prolongs it."""
    _, (job_id, *_) = a_batch(database)
    (token,) = claim(database, [job_id], a_worker(database))
    with database.write() as session:
        jobs.note(session, token, stage=Stage.QUANTIZING)
    with database.write() as session:
        jobs.fail(session, token, DiskFull("no room"), limits=RetryLimits(backoff_s=0.2, max_failures=3), lease_s=1.0)
        session.execute(update(Pause).values(until=db_now(AHEAD_S)))

    def has_ended() -> bool:
        with database.read() as session:
            return not in_force(session)

    tick_until(scheduler, has_ended)


def test_a_clock_set_back_under_a_leader_is_reported_and_ends_nobody(
    database: Database, scheduler: Scheduler, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    tick_until(scheduler, lambda: time.monotonic() > began + settings.lease_s + 0.2)
    assert scheduler._last_contact is not None
    scheduler._last_contact += timedelta(seconds=AHEAD_S)
    set_back_at = time.monotonic()
    scheduler.tick()
    assert "clock was set back by 2" in caplog.text
    _, ids = a_batch(database)
    claim(database, ids, a_worker(database), lease_s=-1.0)
    tick_until(scheduler, lambda: a_job(database, ids[0]).state == JobState.QUEUED)
    assert time.monotonic() - set_back_at >= settings.lease_s


def test_health_says_how_far_ahead_what_was_dated_lies(database: Database) -> None:
    a_worker(database)
    with database.write() as session:
        leases.acquire(session, "scheduler", "a", 30.0)
    with database.read() as session:
        assert health(session, 60.0, lead_s=30.0).ahead_s is None
    with database.write() as session:
        session.execute(update(Worker).values(heartbeat_at=db_now(AHEAD_S)))
    with database.read() as session:
        assert health(session, 60.0, lead_s=30.0).ahead_s == pytest.approx(AHEAD_S, abs=30.0)
