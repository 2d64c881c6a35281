"""Several schedulers: one leads, and none takes a job from a worker that may be alive."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from qbatch.core.domain import JobState, Stage
from qbatch.core.errors import BrokerUnreachable, DiskFull
from qbatch.core.retry_policy import RetryLimits
from qbatch.core.settings import Settings
from qbatch.models_db import jobs
from qbatch.models_db.database_id import database_id
from qbatch.models_db.pauses import in_force
from qbatch.models_db.session import Database
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.loop import Scheduler
from tests.rows import a_batch, a_worker, claim, states


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    # Nothing listens there: leases are looked after all the same.
    return Settings(
        home=tmp_path,
        storage=tmp_path,
        cache=tmp_path,
        broker_url="redis://127.0.0.1:1/0",
        lease_s=0.6,
        heartbeat_s=0.1,
        scan_s=0.1,
        backoff_s=0.01,
    )


def tick(scheduler: Scheduler) -> None:
    try:
        scheduler.tick()
    except BrokerUnreachable:
        return


def tick_until(scheduler: Scheduler, look: Callable[[], bool], timeout_s: float = 30.0) -> float:
    began = time.monotonic()
    while not look():
        assert time.monotonic() - began < timeout_s, "it did not come to pass"
        tick(scheduler)
        time.sleep(0.02)
    return time.monotonic() - began


def tick_for(scheduler: Scheduler, duration_s: float) -> None:
    until = time.monotonic() + duration_s
    tick_until(scheduler, lambda: time.monotonic() > until)


def abandoned(database: Database) -> list[int]:
    """Jobs whose worker fell silent long ago."""
    _, ids = a_batch(database)
    claim(database, ids, a_worker(database), lease_s=-3600.0)
    return ids


def has_expired(database: Database) -> bool:
    return set(states(database).values()) == {JobState.QUEUED}


def test_after_a_start_nobody_is_expired_for_one_lease_then_they_are(database: Database, settings: Settings) -> None:
    abandoned(database)
    scheduler = Scheduler(database, Broker(settings), settings)
    waited_s = tick_until(scheduler, lambda: has_expired(database))
    assert waited_s >= settings.lease_s


def test_one_leads_and_another_takes_over_when_its_lease_runs_out(database: Database, settings: Settings) -> None:
    # Long enough that a busy machine's pauses end neither the first's lead nor its quiet lease.
    settings = replace(settings, scan_s=0.5, lease_s=4.0)
    first = Scheduler(database, Broker(settings), settings)
    second = Scheduler(database, Broker(settings), settings)
    tick(first)
    abandoned(database)
    # The first leads and renews; whatever the second does, it never comes to scan.
    for _ in range(5):
        tick(first)
        second.tick()
    # The first falls silent.
    waited_s = tick_until(second, lambda: has_expired(database))
    assert waited_s >= 3 * settings.scan_s, "the first's lead, then one quiet lease"


def test_a_leader_that_could_not_look_gives_everyone_a_lease_again(
    sqlite_database: Database, settings: Settings
) -> None:
    database = sqlite_database
    scheduler = Scheduler(database, Broker(settings), settings)
    tick_for(scheduler, settings.lease_s + 0.2)
    time.sleep(3 * settings.scan_s)  # an outage
    abandoned(database)
    waited_s = tick_until(scheduler, lambda: has_expired(database))
    assert waited_s >= settings.lease_s


def test_a_steady_leader_expires_at_its_next_scan(sqlite_database: Database, settings: Settings) -> None:
    database = sqlite_database
    # Wide enough apart that a busy machine's pauses are no outage.
    settings = replace(settings, scan_s=2.0, lease_s=20.0)
    scheduler = Scheduler(database, Broker(settings), settings)
    tick(scheduler)
    scheduler._quiet_until = time.monotonic()  # it has led for a lease
    abandoned(database)
    assert tick_until(scheduler, lambda: has_expired(database)) < settings.lease_s


_NEVER_FREE = 2**62


def waits_for_room(database: Database, needed_bytes: int | None) -> int:
    """A job that found the storage full, whose pause is over by now."""
    _, (job_id, *_) = a_batch(database)
    (token,) = claim(database, [job_id], a_worker(database))
    with database.write() as session:
        jobs.note(session, token, stage=Stage.QUANTIZING)
    with database.write() as session:
        assert jobs.fail(
            session,
            token,
            DiskFull("no room", needed_bytes),
            limits=RetryLimits(backoff_s=0.0, max_failures=3),
            lease_s=60.0,
        )
    return job_id


def see_storage(database: Database, settings: Settings) -> None:
    """As if a worker had staged there."""
    with database.write() as session:
        settings.staging_of(database_id(session)).mkdir(parents=True)


def pauses_after_a_tick(database: Database, scheduler: Scheduler) -> int:
    tick(scheduler)
    with database.read() as session:
        return len(in_force(session))


def test_a_pause_holds_while_a_job_waits_for_room_that_is_not_there(database: Database, settings: Settings) -> None:
    settings = replace(settings, backoff_s=60.0)
    see_storage(database, settings)
    job_id = waits_for_room(database, _NEVER_FREE)
    scheduler = Scheduler(database, Broker(settings), settings)
    assert pauses_after_a_tick(database, scheduler) == 1
    with database.write() as session:
        assert jobs.cancel(session, job_ids=[job_id]) == [job_id]
    assert pauses_after_a_tick(database, scheduler) == 0


def test_a_pause_outlasts_a_tick_that_is_later_than_the_backoff(database: Database, settings: Settings) -> None:
    settings = replace(settings, backoff_s=0.01, scan_s=20.0)
    see_storage(database, settings)
    waits_for_room(database, _NEVER_FREE)
    tick(Scheduler(database, Broker(settings), settings))
    time.sleep(0.1)
    with database.read() as session:
        assert len(in_force(session)) == 1


@pytest.mark.parametrize(("needed_bytes", "is_seen"), [(_NEVER_FREE, False), (None, True), (1, True)])
def test_a_pause_is_not_prolonged_where_there_is_room_or_nobody_can_tell(
    database: Database, settings: Settings, needed_bytes: int | None, is_seen: bool
) -> None:
    settings = replace(settings, backoff_s=60.0)
    if is_seen:
        see_storage(database, settings)
    waits_for_room(database, needed_bytes)
    assert pauses_after_a_tick(database, Scheduler(database, Broker(settings), settings)) == 0


def test_the_leader_tells_sqlite_how_large_its_tables_are(sqlite_database: Database, settings: Settings) -> None:
    a_batch(sqlite_database)
    tick(Scheduler(sqlite_database, Broker(settings), settings))
    with sqlite_database.read() as session:
        known = {row.tbl for row in session.execute(text("SELECT tbl FROM sqlite_stat1"))}
    assert {"batches", "jobs"} <= known
