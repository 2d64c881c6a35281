"""How long batches and jobs will still take, on both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select, update

from qbatch.core.domain import Method
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.listing import list_batches, list_jobs
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, Job
from qbatch.models_db.time_left import OpenWork, TimeLeft, judge, time_left, with_time_left
from tests.rows import a_batch, a_worker, bundle, claim, succeed

BOTH = (Method.NF4, Method.INT8)


def left(database: Database) -> TimeLeft:
    with database.read() as session:
        return time_left(session, lease_s=60.0)


def work_off(database: Database, ids: list[int], worker: int, *, seconds: float) -> None:
    """The jobs of a bundle were claimed together so long ago, and the last one has ended now."""
    for token in claim(database, ids, worker):
        assert succeed(database, token)
    set_back(database, ids, seconds)


def set_back(database: Database, ids: list[int], seconds: float) -> None:
    with database.write() as session:
        session.execute(update(Attempt).where(Attempt.job_id.in_(ids)).values(claimed_at=db_now(-seconds)))


def test_nothing_is_guessed_before_anything_has_run(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", *BOTH), bundle("/models/b", *BOTH))
    assert left(database) == TimeLeft()
    claim(database, ids[:2], worker)
    assert left(database) == TimeLeft()


def test_what_waits_takes_as_long_as_what_has_ended(database: Database) -> None:
    worker = a_worker(database)
    batch, ids = a_batch(database, *(bundle(f"/models/{name}", *BOTH) for name in "abcd"))
    work_off(database, ids[:2], worker, seconds=60)
    claim(database, ids[2:4], worker)
    set_back(database, ids[2:4], 20)
    found = left(database)
    assert [found.jobs[job_id] for job_id in ids[2:4]] == pytest.approx([40, 40], abs=2)
    assert found.batches[batch] == pytest.approx(40 + 2 * 60, abs=2)
    a_worker(database, "w2")
    assert left(database).batches[batch] == pytest.approx(40 + 60, abs=2), "one of the two that wait goes to the other"


def test_a_bundle_counts_its_jobs_that_have_ended_already(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, *(bundle(f"/models/{name}", *BOTH) for name in "ab"))
    work_off(database, ids[:2], worker, seconds=60)
    (first, _) = claim(database, ids[2:], worker)
    assert succeed(database, first)
    set_back(database, ids[2:], 50)
    (seconds,) = left(database).jobs.values()
    assert seconds == pytest.approx(10, abs=2)
    set_back(database, ids[2:], 500)
    (seconds,) = left(database).jobs.values()
    assert seconds == pytest.approx(3 + 440 / 2, abs=2), "what takes longer than expected is not said to have ended"


def test_the_later_work_is_the_longer_it_is_expected_to_take(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", *BOTH), bundle("/models/b", *BOTH))
    work_off(database, ids[:2], worker, seconds=60)
    claim(database, ids[2:], worker)
    seen = []
    for elapsed in (59, 90, 180):
        set_back(database, ids[2:], elapsed)
        seen.append(left(database).jobs[ids[2]])
    assert seen == pytest.approx([6, 6 + 15, 6 + 60], abs=2)


def test_without_a_worker_no_end_is_foretold(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, *(bundle(f"/models/{name}", *BOTH) for name in "ab"))
    work_off(database, ids[:2], worker, seconds=60)
    with database.read() as session:
        assert time_left(session, lease_s=-60.0).batches == {}


def work(bundles: int = 0, *, seconds: float = 10.0, running: tuple[float, ...] = (), priority: int = 0) -> OpenWork:
    return OpenWork(priority=priority, running_s=running, bundles=bundles, seconds_per_bundle=seconds)


def test_bundles_go_to_the_worker_that_is_free_first() -> None:
    assert judge(work(3), [], 1) == 30
    assert judge(work(3), [], 2) == 20
    assert judge(work(1), [], 8) == 10, "one bundle is not shared"
    assert judge(work(1, running=(4.0,)), [], 1) == 14
    assert judge(work(running=(4.0,)), [], 3) == 4


def test_other_batches_go_before_or_in_turns() -> None:
    assert judge(work(2), [work(5)], 1) == 40, "as many of the other's as of its own"
    assert judge(work(2), [work(5, priority=1)], 1) == 70
    assert judge(work(2), [work(5, priority=-1)], 1) == 20
    assert judge(work(2), [work(0, running=(7.0,), priority=-1)], 1) == 27, "what runs is not interrupted"


def test_lists_say_how_long_it_took_and_will_take(database: Database) -> None:
    worker = a_worker(database)
    batch, ids = a_batch(database, *(bundle(f"/models/{name}", *BOTH) for name in "ab"))
    work_off(database, ids[:2], worker, seconds=60)
    claim(database, ids[2:3], worker)
    set_back(database, ids[2:3], 20)
    found = left(database)
    with database.read() as session:
        jobs = with_time_left(list_jobs(session), found)
        (listed,) = with_time_left(list_batches(session), found)
    first, second, running, waiting = (row["elapsed_s"] for row in jobs)
    assert (first, second, waiting) == (pytest.approx(60, abs=2), pytest.approx(60, abs=2), None)
    assert 20 <= running < 30
    assert [row["left_s"] is not None for row in jobs] == [False, False, True, False]
    assert listed["left_s"] == round(found.batches[batch], 1)
    assert listed["elapsed_s"] < 30, "since it was submitted"


def test_a_batch_that_has_ended_took_until_its_last_job(database: Database) -> None:
    worker = a_worker(database)
    batch, ids = a_batch(database, bundle("/models/a", *BOTH))
    work_off(database, ids, worker, seconds=1)
    with database.write() as session:
        last = session.get_one(Job, ids[1])
        last.finished_at = session.scalars(select(Job.created_at).where(Job.batch_id == batch)).first() + timedelta(  # type: ignore[operator]
            seconds=90
        )
    with database.read() as session:
        (listed,) = list_batches(session)
    assert round(listed["elapsed_s"]) == 90
