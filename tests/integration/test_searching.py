"""A search is recorded with the job of its first point, whose end decides what follows, on SQLite and PostgreSQL."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, JobState, Method
from qbatch.core.errors import QuantizationError, StorageError, WorkerLost
from qbatch.core.retry_policy import RetryLimits
from qbatch.core.search.bound import Bound
from qbatch.core.settings import Settings
from qbatch.models_db import jobs, listing, searches, window
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.jobs import searching as transitions
from qbatch.models_db.jobs import user_requests
from qbatch.models_db.jobs.transitions import lock
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, Job, SearchRow
from qbatch.worker.housekeeping.prune import prune
from qbatch.worker.runner.messages import JobIdentity, Resolved
from qbatch.worker.serving.answers import Answers
from qbatch.worker.serving.recorder import Recorder
from tests.found import FOUND_KL, KEY, a_search, measured_with, searching
from tests.rows import PROTOCOL, a_batch, a_job, a_worker, claim, fail, states
from tests.waiting import until

BOUND = Bound(max_kl=0.04)
"""The first point that is predicted to be within it is 2: 0.03, and two errors of 0.001."""


def record(database: Database, token: jobs.Token, key: str = KEY) -> bool:
    with database.write() as session:
        return jobs.searched(session, token, key, a_search())


def a_recorded_search(database: Database, bound: Bound = BOUND, worker: int | None = None) -> tuple[int, int]:
    """A search that waits, and its first point's job."""
    _, (search,) = a_batch(database, searching(bound))
    (token,) = claim(database, [search], worker or a_worker(database))
    assert record(database, token)
    return search, points_of(database, search)[-1].id


def points_of(database: Database, search: int) -> list[Job]:
    with database.read() as session:
        ids = session.scalars(select(Job.id).where(Job.search_job_id == search).order_by(Job.id)).all()
    return [a_job(database, job_id) for job_id in ids]


def publish(
    database: Database,
    point: int,
    kl: float | None,
    weights_bytes: int = 1200,
    worker: int = 1,
    more_texts: Mapping[str, Any] | None = None,
) -> None:
    (token,) = claim(database, [point], worker)
    with database.write() as session:
        row = measured_with(kl, weights_bytes, key=f"{point:064}", more_texts=more_texts)
        protocol = PROTOCOL.for_device(DeviceKind.CPU)
        assert jobs.succeed(session, token, row, protocol=protocol, checkpoint_path=f"checkpoints/{point}")


def test_a_recorded_search_waits_for_the_job_of_its_first_point(database: Database) -> None:
    search, point = a_recorded_search(database)
    waiting, published = a_job(database, search), a_job(database, point)
    assert (waiting.state, waiting.stage, waiting.lease_expires_at) == ("queued", None, None)
    assert waiting.checkpoint_key == KEY
    assert (published.state, published.point, published.batch_id) == ("queued", 2, waiting.batch_id)
    assert published.scheme == {**waiting.scheme, "skip_modules": ["kept.0", "kept.1"]}
    assert (published.bits, published.method, published.protocol) == (4, Method.NF4, waiting.protocol)
    assert (published.search, published.search_id, published.checkpoint_key) == (None, None, None)
    with database.read() as session:
        listed = listing.list_jobs(session)
        assert [row["note"] for row in listed] == [f"waits for j{point}", None]
        assert [row["mixture"] for row in listed] == [
            {"bound": {"max_kl": 0.04}},
            {"job_id": f"j{search}", "point": 2},
        ]
        (attempt,) = session.scalars(select(Attempt)).all()
        assert (attempt.outcome, attempt.ended_at is not None) == ("succeeded", True)
        (row,) = session.scalars(select(SearchRow)).all()
        assert (row.key, row.job_id) == (KEY, search)
        assert searches.find_searches(session, [row.id])[row.id] == a_search()


def test_nobody_runs_a_search_that_waits(database: Database) -> None:
    worker = a_worker(database)
    search, point = a_recorded_search(database, worker=worker)
    assert claim(database, [search], worker) == []
    with database.write() as session:
        (dispatch,) = window.choose(session, kind=DeviceKind.CPU, queue="q", slots=8)
    assert dispatch.job_ids == (point,)


def test_a_search_is_recorded_once(database: Database) -> None:
    _, (search,) = a_batch(database, searching(BOUND))
    (token,) = claim(database, [search], a_worker(database))
    assert record(database, token)
    assert not record(database, token), "as a spool does that is replayed"
    assert len(points_of(database, search)) == 1
    publish(database, points_of(database, search)[0].id, kl=0.03)
    assert not record(database, token)
    assert states(database)[search] == "succeeded"


def test_a_search_whose_lease_ran_out_counts_until_it_is_claimed_anew(database: Database) -> None:
    worker = a_worker(database)
    _, (search,) = a_batch(database, searching(BOUND))
    (old,) = claim(database, [search], worker)
    with database.write() as session:
        jobs.hand_back(session, [old])
    (new,) = claim(database, [search], worker)
    assert not record(database, old)
    assert points_of(database, search) == []
    assert record(database, new)


def test_a_row_within_the_bound_ends_the_search_with_it(database: Database) -> None:
    search, point = a_recorded_search(database)
    publish(database, point, kl=0.038)
    ended, answer = a_job(database, search), a_job(database, point)
    assert (ended.state, ended.reused_from, ended.checkpoint_key) == ("succeeded", point, f"{point:064}")
    assert ended.scheme == answer.scheme
    assert ended.finished_at is not None
    assert set(states(database).values()) == {"succeeded"}


def test_a_row_over_the_bound_asks_for_the_next_point(database: Database) -> None:
    search, first = a_recorded_search(database)
    publish(database, first, kl=0.0381)
    second = points_of(database, search)[-1]
    assert (second.point, second.state, states(database)[search]) == (3, "queued", "queued")
    publish(database, second.id, kl=0.0381)
    third = points_of(database, search)[-1]
    assert third.point == 4
    publish(database, third.id, kl=0.0390)
    assert [point.point for point in points_of(database, search)] == [2, 3, 4]
    ended = a_job(database, search)
    assert (ended.state, ended.error_kind) == ("failed", "bound_not_kept")
    assert ended.error_message == (
        "3 mixtures were published and none has a KL of at most 0.04, two errors included; the nearest, mixture 2, "
        "keeps 2 layers at 16 bits: KL 0.0381 ± 0.001"
    )
    assert {states(database)[point.id] for point in points_of(database, search)} == {"succeeded"}


def test_a_bound_holds_on_every_text_that_was_asked_for(database: Database) -> None:
    search, first = a_recorded_search(database)
    publish(database, first, kl=0.03, more_texts={"code": {"kl_mean": 0.0381, "kl_mean_se": 0.001}})
    second = points_of(database, search)[-1]
    assert (second.point, states(database)[search]) == (3, "queued")
    publish(database, second.id, kl=0.03, more_texts={"code": {"kl_mean": 0.037, "kl_mean_se": 0.001}})
    assert states(database)[search] == "succeeded"


def test_a_text_that_was_not_compared_ends_the_search(database: Database) -> None:
    search, point = a_recorded_search(database)
    publish(database, point, kl=0.01, more_texts={"code": {"reason": "the disk was full"}})
    assert "it was not compared with its baseline (the disk was full)" in str(a_job(database, search).error_message)


def test_a_row_that_was_not_compared_ends_the_search(database: Database) -> None:
    search, point = a_recorded_search(database)
    publish(database, point, kl=None)
    ended = a_job(database, search)
    assert (ended.state, ended.error_kind) == ("failed", "bound_not_kept")
    assert "it was not compared with its baseline (its baseline failed)" in str(ended.error_message)


def test_a_bound_that_no_mixture_keeps_fails_without_a_point(database: Database) -> None:
    _, (search,) = a_batch(database, searching(Bound(max_weights_bytes=900)))
    (token,) = claim(database, [search], a_worker(database))
    assert record(database, token)
    assert points_of(database, search) == []
    assert a_job(database, search).error_kind == "bound_not_kept"


def test_a_bound_of_bytes_is_met_by_the_best_that_fits(database: Database) -> None:
    search, point = a_recorded_search(database, Bound(max_weights_bytes=1350))
    assert a_job(database, point).point == 3
    publish(database, point, kl=None, weights_bytes=1300)
    assert states(database)[search] == "succeeded"


def test_where_a_points_job_fails_its_search_does_with_a_pointer(database: Database) -> None:
    search, point = a_recorded_search(database)
    (token,) = claim(database, [point], 1)
    assert fail(database, token, StorageError("the mount is gone"))
    assert states(database)[search] == "queued", "the point is tried again"
    with database.write() as session:
        session.execute(update(Job).values(not_before=None, avoid_worker_id=None))
    (token,) = claim(database, [point], 1)
    assert fail(database, token, QuantizationError("no such kernel"))
    ended = a_job(database, search)
    assert (ended.state, ended.error_kind) == ("failed", "quantization_error")
    assert ended.error_message == f"j{point}, which publishes what it found, failed: no such kernel"


def test_a_retried_search_goes_on_from_what_it_found(database: Database) -> None:
    search, point = a_recorded_search(database)
    (token,) = claim(database, [point], 1)
    fail(database, token, QuantizationError("no such kernel"))
    with database.write() as session:
        assert jobs.retry(session, job_ids=[search]) == [search]
    (token,) = claim(database, [search], 1)
    with database.write() as session:
        assert jobs.answer_search(session, token, KEY, searches.newest(session, [KEY])[KEY])
    assert states(database) == {search: "queued", point: "queued"}
    publish(database, point, kl=0.03)
    assert states(database) == {search: "succeeded", point: "succeeded"}
    assert len(points_of(database, search)) == 1


def test_a_forced_search_is_made_once_though_it_is_retried(database: Database) -> None:
    """Else its point's number would be one of a frontier that it is not of."""
    worker = a_worker(database)
    _, (search, unfound) = a_batch(database, searching(BOUND, force=True), searching(Bound(max_kl=0.02), force=True))
    (token,) = claim(database, [search], worker)
    assert record(database, token)
    with database.write() as session:
        jobs.cancel(session, job_ids=[search, unfound, points_of(database, search)[0].id])
        assert jobs.retry(session, job_ids=[search, unfound]) == [search, unfound]
    assert (a_job(database, search).force, a_job(database, unfound).force) == (False, True)


def test_a_point_retried_with_its_search_is_waited_for(database: Database) -> None:
    search, point = a_recorded_search(database)
    (token,) = claim(database, [point], 1)
    fail(database, token, QuantizationError("no such kernel"))
    with database.write() as session:
        assert jobs.retry(session, job_ids=[search, point]) == [search, point]
    publish(database, point, kl=0.03)
    assert states(database)[search] == "queued", "nobody has told it what it found yet"
    (token,) = claim(database, [search], 1)
    with database.write() as session:
        assert jobs.answer_search(session, token, KEY, searches.newest(session, [KEY])[KEY])
    assert states(database)[search] == "succeeded"


def test_a_late_success_of_a_point_revives_its_search(database: Database) -> None:
    search, point = a_recorded_search(database)
    for _ in range(3):
        with database.write() as session:
            session.execute(update(Job).values(not_before=None, avoid_worker_id=None))
        (token,) = claim(database, [point], 1)
        with database.write() as session:
            jobs.note(session, token, work_started=True)
            jobs.expire(session, worker_id=1, limits=RetryLimits(backoff_s=0.01, max_failures=3))
    assert a_job(database, search).error_kind == WorkerLost.kind
    with database.write() as session:
        protocol = PROTOCOL.for_device(DeviceKind.CPU)
        row = measured_with(0.05, 1200)
        assert jobs.succeed(session, token, row, protocol=protocol, checkpoint_path="checkpoints/x")
    revived = a_job(database, search)
    assert (revived.state, revived.error_kind, revived.finished_at) == ("queued", None, None)
    assert [one.point for one in points_of(database, search)] == [2, 3]


@pytest.mark.parametrize("which", ["search", "point"])
def test_a_search_and_its_points_job_are_cancelled_together(database: Database, which: str) -> None:
    search, point = a_recorded_search(database)
    (token,) = claim(database, [point], 1)
    with database.write() as session:
        assert jobs.cancel(session, job_ids=[search if which == "search" else point]) == [search, point]
    assert not fail(database, token, QuantizationError("too late"))
    assert set(states(database).values()) == {"cancelled"}
    with database.write() as session:
        assert jobs.retry(session, job_ids=[search]) == [search]
    (token,) = claim(database, [search], 1)
    with database.write() as session:
        assert jobs.answer_search(session, token, KEY, searches.newest(session, [KEY])[KEY])
    assert states(database) == {search: "queued", point: "queued"}


def test_a_point_that_is_added_while_its_cancelling_waits_is_cancelled_too(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the first may add the next before the rows are locked."""
    search, point = a_recorded_search(database)
    lock, added = user_requests.lock, list[int]()

    def lock_late(session: Session, *conditions: Any) -> Any:
        if not added:
            values = {column.name: getattr(a_job(database, point), column.name) for column in Job.__table__.columns}
            added.append(point + 1)
            session.execute(insert(Job).values(values | {"id": point + 1, "point": 99}))
        return lock(session, *conditions)

    monkeypatch.setattr(user_requests, "lock", lock_late)
    with database.write() as session:
        assert jobs.cancel(session, job_ids=[search]) == [search, point, *added]


def test_what_another_search_stored_meanwhile_answers(database: Database) -> None:
    worker = a_worker(database)
    a_recorded_search(database, worker=worker)
    other, _ = a_recorded_search(database, Bound(max_kl=0.02), worker)
    with database.read() as session:
        (only,) = session.scalars(select(SearchRow.id)).all()
    assert a_job(database, other).search_id == only


def test_a_point_is_not_run_before_its_baseline(database: Database) -> None:
    worker = a_worker(database)
    _, (baseline, search) = a_batch(database, searching(BOUND, with_baseline=True))
    (token,) = claim(database, [search], worker)
    with database.write() as session:
        jobs.hand_back(session, [token], alone=True)
    (token,) = claim(database, [search], worker)
    record(database, token)
    (point,) = points_of(database, search)
    assert point.bundle == a_job(database, baseline).bundle != a_job(database, search).bundle
    assert [states(database)[job_id] for job_id in (baseline, search, point.id)] == [JobState.QUEUED] * 3
    assert len(FOUND_KL) == 5


# A key that is known


def resolve(database: Database, storage: Path, search: int, worker: int) -> frozenset[int]:
    """The worker of a search asks what is known of it. The jobs that are answered, or returned to the queue."""
    with database.write() as session:
        claims = {claim.job_id: claim for claim in jobs.claim(session, [search], worker, 60.0)}
    identity = JobIdentity(key=KEY, legacy_key=None, protocol_hash="p")
    return Answers(database, storage, "a CPU", claims).find(Resolved(jobs={search: identity})).job_ids


def test_what_is_stored_answers_a_later_bound(database: Database, tmp_path: Path) -> None:
    worker = a_worker(database)
    first, _ = a_recorded_search(database, worker=worker)
    _, (later,) = a_batch(database, searching(Bound(max_kl=0.02)))
    assert resolve(database, tmp_path, later, worker) == {later}
    assert [point.point for point in points_of(database, later)] == [4]
    assert a_job(database, later).search_id == a_job(database, first).search_id


def test_a_forced_search_is_made_anew_and_answers_from_then_on(database: Database, tmp_path: Path) -> None:
    worker = a_worker(database)
    first, _ = a_recorded_search(database, worker=worker)
    _, (forced,) = a_batch(database, searching(BOUND, force=True))
    assert resolve(database, tmp_path, forced, worker) == frozenset()
    assert record(database, (forced, 1))
    assert a_job(database, forced).search_id != a_job(database, first).search_id
    assert points_of(database, forced)[0].force
    with database.read() as session:
        assert searches.newest(session, [KEY]) == {KEY: a_job(database, forced).search_id}


def test_what_another_runner_searches_is_waited_for(database: Database, tmp_path: Path) -> None:
    one, other = a_worker(database), a_worker(database, "w2")
    _, (first,) = a_batch(database, searching(BOUND))
    _, (second,) = a_batch(database, searching(BOUND))
    assert resolve(database, tmp_path, first, one) == frozenset()
    assert resolve(database, tmp_path, second, other) == {second}
    assert (a_job(database, second).state, points_of(database, second)) == ("queued", [])


def test_a_result_of_a_search_waits_in_the_spool(database: Database, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, storage=tmp_path / "storage", cache=tmp_path / "cache")
    _, (search,) = a_batch(database, searching(BOUND))
    (token,) = claim(database, [search], a_worker(database))
    away = Database("postgresql://nobody@127.0.0.1:1/none")
    Recorder(away, settings).searched(token, KEY, a_search())
    away.dispose()
    assert [path.name for path in settings.spool.iterdir()] == [f"{search}-1.json"]
    Recorder(database, settings).replay()
    assert rows(database) == (1, 1)
    assert list(settings.spool.iterdir()) == []
    with database.read() as session:
        assert [*searches.find_searches(session, [1]).values()] == [a_search()]


def test_prune_removes_searches_with_their_jobs(database: Database, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, storage=tmp_path / "storage", cache=tmp_path / "cache")
    old, point = a_recorded_search(database)
    publish(database, point, kl=0.03)
    kept, _ = a_recorded_search(database, Bound(max_kl=0.02))
    with database.write() as session:
        session.execute(update(SearchRow).values(created_at=db_now(-100.0)))
        session.execute(update(Job).where(Job.id.in_([old, point])).values(finished_at=db_now(-100.0)))
    assert {one.what: one.number for one in prune(database, settings, 10.0)}["jobs"] == 2
    assert rows(database) == (1, 1), "an open job refers to it"
    with database.write() as session:
        jobs.cancel(session, job_ids=[kept])
        session.execute(update(Job).values(finished_at=db_now(-100.0)))
    prune(database, settings, 10.0)
    assert rows(database) == (0, 0)


# Kills


def dies_after(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which kills its process at the end of its first call."""
    calls = itertools.count(1)

    def counted(*arguments: object, **words: object) -> Any:
        returned = function(*arguments, **words)
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return returned

    return counted


def run_killed(database: Database, owner: Any, name: str, act: Callable[[Database], object]) -> None:
    """``act`` in a process of its own, which is killed at the end of that function."""

    def run() -> None:
        setattr(owner, name, dies_after(getattr(owner, name)))
        act(Database(database.engine.url.render_as_string(hide_password=False)))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


KILLS = {
    "what was found is stored": (searches, "add", False),
    "the job of the first point is inserted": (transitions, "add_jobs", False),
    "all is recorded": (Recorder, "_write", True),
}


@pytest.mark.parametrize(("owner", "name", "is_there"), KILLS.values(), ids=KILLS.keys())
def test_a_kill_leaves_a_search_unrecorded_or_its_job_there_once(
    database: Database, tmp_path: Path, owner: Any, name: str, is_there: bool
) -> None:
    worker = a_worker(database)
    settings = Settings(home=tmp_path, storage=tmp_path / "storage", cache=tmp_path / "cache")
    _, (search,) = a_batch(database, searching(BOUND))
    (token,) = claim(database, [search], worker)
    run_killed(database, owner, name, lambda other: Recorder(other, settings).searched(token, KEY, a_search()))
    assert rows(database) == ((1, 1) if is_there else (0, 0))
    if not is_there:
        # A server holds the locks of a process for some milliseconds after its end.
        until(lambda: expired(database, worker) == [search], "end of the killed process's locks")
        (again,) = claim(database, [search], worker)
        Recorder(database, settings).searched(again, KEY, a_search())
    assert rows(database) == (1, 1)
    publish(database, points_of(database, search)[0].id, kl=0.03)
    assert set(states(database).values()) == {"succeeded"}


def expired(database: Database, worker: int) -> list[int]:
    with database.write() as session:
        return list(jobs.expire(session, worker_id=worker, limits=RetryLimits(backoff_s=0.0, max_failures=3)))


def rows(database: Database) -> tuple[int, int]:
    """The numbers of stored searches, and of jobs that publish what they found."""
    with database.read() as session:
        stored = session.scalars(select(SearchRow.id)).all()
        points = session.scalars(select(Job.id).where(Job.search_job_id.is_not(None))).all()
    return len(stored), len(points)


def test_a_kill_between_a_points_end_and_the_next_leaves_neither(database: Database) -> None:
    search, point = a_recorded_search(database)
    (token,) = claim(database, [point], 1)

    def succeed(other: Database) -> None:
        with other.write() as session:
            row, protocol = measured_with(0.05, 1200), PROTOCOL.for_device(DeviceKind.CPU)
            jobs.succeed(session, token, row, protocol=protocol, checkpoint_path="checkpoints/x")

    run_killed(database, transitions, "add_jobs", succeed)
    assert states(database) == {search: "queued", point: "running"}
    succeed(database)
    assert [(one.point, one.state) for one in points_of(database, search)] == [(2, "succeeded"), (3, "queued")]


ENDINGS: dict[str, Callable[[Session, Sequence[jobs.Token]], object]] = {
    "expired": lambda session, _: jobs.expire(session, worker_id=1, limits=RetryLimits(backoff_s=0.0, max_failures=1)),
    "handed back": lambda session, tokens: jobs.hand_back(session, tokens),
}


@pytest.mark.parametrize("end", ENDINGS.values(), ids=ENDINGS.keys())
def test_points_that_end_together_wait_in_no_circle(
    postgresql_database: Database, end: Callable[[Session, Sequence[jobs.Token]], object]
) -> None:
    """Another transaction has locked the second search, and wants the first point next: no circle of waiting."""
    database = postgresql_database
    worker = a_worker(database)
    _, searches_ = a_batch(database, [*searching(BOUND), *searching(BOUND)])
    for token in claim(database, searches_, worker):
        assert record(database, token)
    first, second = (points_of(database, search)[0].id for search in searches_)
    tokens = claim(database, [first, second], worker)
    with database.write() as session:
        for token in tokens:
            jobs.note(session, token, work_started=True)

    def act() -> None:
        with database.write() as session:
            end(session, tokens)

    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            lock(session, Job.id == searches_[1])
            ended = pool.submit(act)
            wait([ended], timeout=1.0)
            lock(session, Job.id == first)
        ended.result()
    assert states(database)[first] in ("queued", "failed")
