"""An outcome is recorded, or spooled and recorded later; never lost, never counted twice."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import select

from models_db import jobs
from models_db.domain import DeviceKind, JobState
from models_db.errors import DatabaseUnreachable, QuantizationError, SourceCorrupt, WorkerLost
from models_db.session import Database
from models_db.settings import Settings
from models_db.tables import Checkpoint, Result
from tests.rows import POLICY, PROTOCOL, a_batch, a_job, a_worker, bundle, claim, measured, states
from worker.checkpoint import Published
from worker.recorder import Recorder

ADDRESS = PROTOCOL.for_device(DeviceKind.CPU)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, storage=tmp_path / "storage", cache=tmp_path / "cache", backoff_s=0.01)


@pytest.fixture
def cut_off(settings: Settings) -> Recorder:
    """A recorder whose database does not answer."""
    return Recorder(Database("postgresql://nobody@127.0.0.1:1/none"), settings)


def published(key: str = "k" * 64, root: str = "r" * 64) -> Published:
    return Published(
        key=key, path="checkpoints/x", root_sha256=root, disk_bytes=7, audit={}, quantize_s=1.0, versions={"x": "1"}
    )


def succeed(recorder: Recorder, token: jobs.Token) -> None:
    recorder.succeed(token, measured(), ADDRESS, published())


def spooled(settings: Settings) -> list[str]:
    return sorted(path.name for path in settings.spool.iterdir()) if settings.spool.exists() else []


def results_of(database: Database) -> list[int]:
    with database.read() as session:
        return list(session.scalars(select(Result.job_id).order_by(Result.job_id)))


def test_an_outcome_goes_to_the_database_at_once(database: Database, settings: Settings) -> None:
    _, ids = a_batch(database)
    first, second, third = claim(database, ids, a_worker(database))
    recorder = Recorder(database, settings)
    succeed(recorder, first)
    succeed(recorder, second)
    recorder.fail(third, QuantizationError("no"))
    assert [states(database)[token[0]] for token in (first, second, third)] == ["succeeded", "succeeded", "failed"]
    assert results_of(database) == sorted([first[0], second[0]])
    with database.read() as session:
        (row,) = session.scalars(select(Checkpoint)).all()
        assert (row.key, row.path, row.disk_bytes) == ("k" * 64, "checkpoints/x", 7)
    assert spooled(settings) == []


def test_while_the_database_is_away_outcomes_are_spooled_and_recorded_later(
    database: Database, settings: Settings, cut_off: Recorder
) -> None:
    _, ids = a_batch(database)
    good, bad, lost = claim(database, ids, a_worker(database))
    succeed(cut_off, good)
    cut_off.fail(bad, QuantizationError("a tensor of NaN"))
    cut_off.fail(lost, WorkerLost("gone"))
    assert spooled(settings) == sorted(f"{job_id}-{attempt}.json" for job_id, attempt in (good, bad, lost))
    with pytest.raises(DatabaseUnreachable):
        cut_off.replay()
    assert len(spooled(settings)) == 3, "nothing is lost by trying"
    Recorder(database, settings).replay()
    assert spooled(settings) == []
    assert a_job(database, good[0]).state == JobState.SUCCEEDED
    failed = a_job(database, bad[0])
    assert (failed.state, failed.error_kind, failed.error_message) == (
        "failed",
        "quantization_error",
        "a tensor of NaN",
    )
    again = a_job(database, lost[0])
    assert (again.state, again.failures) == (JobState.QUEUED, 1)


def test_a_hand_back_is_spooled_too(database: Database, settings: Settings, cut_off: Recorder) -> None:
    _, ids = a_batch(database)
    first, second, _ = claim(database, ids, a_worker(database))
    cut_off.hand_back([first, second], alone=True)
    Recorder(database, settings).replay()
    assert spooled(settings) == []
    jobs_of_it = [a_job(database, token[0]) for token in (first, second)]
    assert [(job.state, job.failures) for job in jobs_of_it] == [("queued", 0)] * 2
    assert jobs_of_it[0].bundle != jobs_of_it[1].bundle


def test_an_outcome_that_no_disk_takes_is_kept_until_the_database_or_the_disk_does(
    database: Database, settings: Settings, cut_off: Recorder
) -> None:
    """An embedded database and the spool share a disk: when it is full, neither takes anything."""
    _, ids = a_batch(database)
    first, second, _ = claim(database, ids, a_worker(database))
    settings.spool.parent.write_text("no folder can be made here")
    succeed(cut_off, first)
    cut_off.fail(second, QuantizationError("no"))
    with pytest.raises(DatabaseUnreachable):
        cut_off.replay()
    settings.spool.parent.unlink()
    for _ in range(2):
        with pytest.raises(DatabaseUnreachable):
            cut_off.replay()
    assert len(spooled(settings)) == 2, "there is room again, and the database is still away"
    Recorder(database, settings).replay()
    assert [a_job(database, token[0]).state for token in (first, second)] == ["succeeded", "failed"]
    assert spooled(settings) == []


def test_an_outcome_in_memory_is_recorded_once_the_database_answers(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ids = a_batch(database)
    token, *_ = claim(database, ids, a_worker(database))
    settings.spool.parent.write_text("no folder can be made here")
    recorder = Recorder(database, settings)
    with monkeypatch.context() as away:
        away.setattr(recorder, "_database", Database("postgresql://nobody@127.0.0.1:1/none"))
        succeed(recorder, token)
    assert a_job(database, token[0]).state == JobState.RUNNING
    for _ in range(2):
        recorder.replay()
    assert a_job(database, token[0]).state == JobState.SUCCEEDED
    assert results_of(database) == [token[0]]


def test_a_spooled_result_counts_although_the_lease_ran_out(
    database: Database, settings: Settings, cut_off: Recorder
) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a"))
    token, *_ = claim(database, ids, worker)
    succeed(cut_off, token)
    with database.write() as session:
        jobs.expire(session, **POLICY, worker_id=worker)
    Recorder(database, settings).replay()
    assert a_job(database, token[0]).state == JobState.SUCCEEDED


@pytest.mark.parametrize("ending", ["lost", "failed", "cancelled"])
def test_a_spooled_result_counts_where_the_job_was_given_up_for_want_of_it_alone(
    database: Database, settings: Settings, cut_off: Recorder, ending: str
) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a"))
    token, *_ = claim(database, ids, worker)
    succeed(cut_off, token)
    with database.write() as session:
        jobs.note(session, token, work_started=True)
        if ending == "lost":
            jobs.expire(session, backoff_s=0.01, max_failures=1, worker_id=worker)
        elif ending == "failed":
            jobs.fail(session, token, SourceCorrupt("no"), lease_s=60.0, **POLICY)
        else:
            jobs.cancel(session, job_ids=[token[0]])
    ended = a_job(database, token[0])
    assert ended.state == (JobState.CANCELLED if ending == "cancelled" else JobState.FAILED)
    Recorder(database, settings).replay()
    job = a_job(database, token[0])
    assert job.state == (JobState.SUCCEEDED if ending == "lost" else ended.state)
    assert (job.error_kind is None) == (ending != "failed")
    assert len(results_of(database)) == (ending == "lost")


def test_a_spooled_outcome_does_not_touch_a_newer_attempt(
    database: Database, settings: Settings, cut_off: Recorder
) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database)
    stale = claim(database, ids, worker)
    succeed(cut_off, stale[0])
    cut_off.fail(stale[1], QuantizationError("no"))
    with database.write() as session:
        jobs.hand_back(session, stale)
    claim(database, ids, worker)
    Recorder(database, settings).replay()
    assert set(states(database).values()) == {JobState.RUNNING}
    assert results_of(database) == []
    assert spooled(settings) == []


def test_replaying_twice_is_harmless(database: Database, settings: Settings, cut_off: Recorder) -> None:
    _, ids = a_batch(database)
    token, *_ = claim(database, ids, a_worker(database))
    recorder = Recorder(database, settings)
    for _ in range(2):
        succeed(cut_off, token)
        recorder.replay()
    recorder.replay()
    assert results_of(database) == [token[0]]


def test_the_workers_of_a_machine_replay_one_spool_at_once(
    database: Database, settings: Settings, cut_off: Recorder
) -> None:
    _, ids = a_batch(database, *[bundle(f"/models/{n}") for n in range(5)])
    tokens = claim(database, ids, a_worker(database))
    for token in tokens:
        succeed(cut_off, token)
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def replay() -> None:
        start.wait()
        try:
            Recorder(database, settings).replay()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=replay) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(states(database).values()) == {JobState.SUCCEEDED}
    assert spooled(settings) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("1-1", "{"), ("1-1", "{}"), ("1-1", '{"outcome": "failed", "kind": "no such kind", "message": ""}'), ("x", "{}")],
)
def test_what_cannot_be_recorded_is_set_aside_and_stops_nothing(
    sqlite_database: Database, settings: Settings, cut_off: Recorder, name: str, content: str
) -> None:
    _, ids = a_batch(sqlite_database)
    token = claim(sqlite_database, ids, a_worker(sqlite_database))[2]
    settings.spool.mkdir(parents=True)
    (settings.spool / f"{name}.json").write_text(content)
    succeed(cut_off, token)
    Recorder(sqlite_database, settings).replay()
    assert spooled(settings) == [f"{name}.rejected"]
    assert a_job(sqlite_database, token[0]).state == JobState.SUCCEEDED


def test_two_workers_may_record_the_same_checkpoint_at_once(database: Database, settings: Settings) -> None:
    _, ids = a_batch(database, *[bundle(f"/models/{n}") for n in range(4)])
    tokens = claim(database, ids, a_worker(database))
    failures: list[BaseException] = []
    start = threading.Barrier(len(tokens))

    def record(token: jobs.Token) -> None:
        start.wait()
        try:
            succeed(Recorder(database, settings), token)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=record, args=(token,)) for token in tokens]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(states(database).values()) == {JobState.SUCCEEDED}
