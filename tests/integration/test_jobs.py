"""The job state machine, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update

from qbatch.commands.context import connect
from qbatch.core.byte_units import GIB
from qbatch.core.domain import DeviceKind, JobState, Method, Stage
from qbatch.core.errors import (
    CudaOom,
    DatabaseUnreachable,
    DeviceError,
    DiskFull,
    JobError,
    JobTimeout,
    QuantizationError,
    SourceChanged,
    WorkerLost,
)
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import MEASURED_COLUMNS, Measurement
from qbatch.core.retry_policy import RetryLimits
from qbatch.core.settings import Settings
from qbatch.models_db import finished_results, jobs, listing, results, window, workers
from qbatch.models_db.batches import NewJob, add_text, text_content
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.job_record import whole_jobs
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, Job, Worker
from tests.rows import (
    POLICY,
    PROTOCOL,
    a_batch,
    a_gpu,
    a_job,
    a_worker,
    bundle,
    claim,
    fail,
    measured,
    spec,
    states,
    succeed,
)
from tests.unit.test_golden_views import REAL
from tests.waiting import until


def test_a_claim_takes_the_baseline_first_and_counts_the_attempt(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database)
    with database.write() as session:
        claims = jobs.claim(session, ids, worker, 60.0)
    assert [c.spec.scheme.method for c in claims] == [Method.NONE, Method.INT8, Method.NF4]
    assert {c.attempt for c in claims} == {1}
    assert claim(database, ids, worker) == []


def test_of_many_claimants_at_once_one_gets_each_job(database: Database) -> None:
    _, ids = a_batch(database, *[bundle(f"/models/{n}") for n in range(5)])
    claimants = [a_worker(database, f"w{n}") for n in range(6)]
    taken: list[list[jobs.Token]] = []
    threads = [threading.Thread(target=lambda w=w: taken.append(claim(database, ids, w))) for w in claimants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(token for tokens in taken for token in tokens) == [(job_id, 1) for job_id in ids]


def test_concurrent_heartbeats_and_notes_lose_no_update(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, *[bundle(f"/models/{n}", Method.NF4) for n in range(4)])
    tokens = claim(database, ids, worker)

    def count(token: jobs.Token) -> None:
        for _ in range(25):
            with database.write() as session:
                job = session.get_one(Job, token[0])
                done = (job.progress or {}).get("n", 0)
                jobs.note(session, token, progress={"n": done + 1})

    threads = [threading.Thread(target=count, args=(token,)) for token in tokens]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a_job(database, job_id).progress for job_id in ids] == [{"n": 25}] * 4


def test_a_heartbeat_names_the_jobs_still_held(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database)
    tokens = claim(database, ids, worker)
    with database.write() as session:
        jobs.cancel(session, job_ids=[ids[0]])
    with database.write() as session:
        assert jobs.heartbeat(session, tokens, 60.0) == frozenset(ids[1:])
    with database.read() as session:
        assert jobs.held(session, tokens) == frozenset(ids[1:])
        assert jobs.held(session, []) == frozenset()


def test_a_result_is_recorded_once(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database)
    tokens = claim(database, ids, worker)
    assert succeed(database, tokens[1])
    assert not succeed(database, tokens[1])
    with database.read() as session:
        rows = results.find_results(session, sort="-disk_bytes")
    assert [row.state for row in rows].count("succeeded") == 1
    assert rows[0].disk_bytes == 10
    assert rows[0].baseline_job_id == f"j{ids[0]}"
    assert rows[0].perplexity is None


def test_a_measurement_that_is_no_number_is_kept_as_none(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    (token,) = claim(database, ids, worker)
    details = {"kl": {"mean": float("nan"), "all": [float("inf"), 1.0]}, "note": "a\0b"}
    with database.write() as session:
        protocol = PROTOCOL.for_device(DeviceKind.CPU)
        found = replace(measured(), details=Details.from_json(details))
        assert jobs.succeed(session, token, found, protocol=protocol, checkpoint_path=None)
    with database.read() as session:
        (row,) = results.find_results(session)
    assert row.details.to_json() == {"kl": {"mean": None, "all": [None, 1.0]}, "note": "a\0b"}


@pytest.mark.parametrize("row", REAL[:2], ids=["baseline", "int8"])
def test_what_was_measured_comes_back_as_it_was(database: Database, row: dict[str, Any]) -> None:
    """Key by key, in the same order: it is what ``results --json`` shows."""
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    (token,) = claim(database, ids, worker)
    found = Measurement.from_json({name: row[name] for name in (*MEASURED_COLUMNS, "details")})
    with database.write() as session:
        protocol = PROTOCOL.for_device(DeviceKind.CPU)
        assert jobs.succeed(session, token, found, protocol=protocol, checkpoint_path=None)
    with database.read() as session:
        (job,) = whole_jobs(session, ids)
    shown = job.to_json()
    came_later = {"above_memory_is", "graph_decode_tokens_per_s", "log_path", "not_measured", "speed_from"}
    assert [name for name in shown if name not in came_later] == list(row)
    assert {name: shown[name] for name in MEASURED_COLUMNS} == {name: row[name] for name in MEASURED_COLUMNS}
    assert json.dumps(shown["details"]) == json.dumps(row["details"])


def test_a_message_that_quotes_a_nul_is_recorded(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    (token,) = claim(database, ids, worker)
    assert fail(database, token, QuantizationError("the tensor 'a\0b'"))
    assert a_job(database, ids[0]).error_message == "the tensor 'a\\x00b'"


def test_an_expired_attempt_may_still_finish_until_a_newer_one_is_claimed(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4, Method.INT8))
    first = claim(database, ids, worker, lease_s=0.01)
    time.sleep(0.05)
    with database.write() as session:
        assert jobs.expire(session, **POLICY) == ids
    assert succeed(database, first[0]), "nobody took the job up in between, so the result counts"
    second = claim(database, ids, worker)
    assert [attempt for _, attempt in second] == [2]
    stale = (second[0][0], 1)
    assert not succeed(database, stale)
    assert not fail(database, stale, QuantizationError("late"))
    with database.write() as session:
        assert jobs.heartbeat(session, [stale], 60.0) == frozenset()
    assert states(database)[second[0][0]] == JobState.RUNNING


def test_only_work_that_had_started_is_charged_when_a_lease_runs_out(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4, Method.INT8))
    tokens = dict(claim(database, ids, worker, lease_s=0.01))
    with database.write() as session:
        jobs.note(session, (ids[0], tokens[ids[0]]), stage=Stage.QUANTIZING, work_started=True)
    time.sleep(0.05)
    with database.write() as session:
        jobs.expire(session, **POLICY)
    assert [a_job(database, job_id).failures for job_id in ids] == [1, 0]
    bundles = {a_job(database, job_id).bundle for job_id in ids}
    assert len(bundles) == 2, "after a loss each job is sent alone"


def test_three_losses_end_a_job(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    for _ in range(3):
        time.sleep(0.1)
        (token,) = claim(database, ids, worker)
        fail(database, token, WorkerLost("the runner died"))
    job = a_job(database, ids[0])
    assert (job.state, job.error_kind, job.failures, job.attempt) == (JobState.FAILED, "worker_lost", 3, 3)
    with database.read() as session:
        outcomes = session.scalars(select(Attempt.outcome).order_by(Attempt.attempt)).all()
    assert outcomes == ["worker_lost"] * 3


@pytest.mark.parametrize(
    ("error", "state", "failures"),
    [
        (QuantizationError("no"), JobState.FAILED, 0),
        (CudaOom("no"), JobState.FAILED, 0),
        (WorkerLost("no"), JobState.QUEUED, 1),
        (JobTimeout("no"), JobState.QUEUED, 1),
        (DeviceError("no"), JobState.QUEUED, 0),
        (DiskFull("no"), JobState.QUEUED, 0),
    ],
)
def test_the_error_decides_what_happens_next(
    database: Database, error: JobError, state: JobState, failures: int
) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    (token,) = claim(database, ids, worker)
    assert fail(database, token, error)
    job = a_job(database, ids[0])
    assert (job.state, job.failures) == (state, failures)


def test_a_timeout_is_tried_once_more(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    for _ in range(2):
        time.sleep(0.05)
        (token,) = claim(database, ids, worker)
        fail(database, token, JobTimeout("over 1 s"))
    assert a_job(database, ids[0]).state == JobState.FAILED


def test_after_a_retry_a_timeout_is_tried_once_more_again(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    ends = []
    for _ in range(4):
        time.sleep(0.05)
        (token,) = claim(database, ids, worker)
        fail(database, token, JobTimeout("over 1 s"))
        ends.append(a_job(database, ids[0]).state)
        with database.write() as session:
            jobs.retry(session, job_ids=ids)
    assert ends == ["queued", "failed", "queued", "failed"]


def test_a_batch_larger_than_a_statement_may_name_is_cancelled_and_retried(sqlite_database: Database) -> None:
    batch_id, ids = a_batch(sqlite_database)
    count = 35_000
    with sqlite_database.write() as session:
        row = {column.name: getattr(session.get_one(Job, ids[0]), column.name) for column in Job.__table__.columns}
        session.execute(insert(Job), [row | {"id": number} for number in range(10, 10 + count)])
    with sqlite_database.write() as session:
        assert len(jobs.cancel(session, batch_ids=[batch_id])) == count + len(ids)
    with sqlite_database.write() as session:
        assert len(jobs.retry(session, batch_ids=[batch_id])) == count + len(ids)


def test_whatever_locks_jobs_at_once_none_is_ended_as_a_deadlock(postgresql_database: Database) -> None:
    database = postgresql_database
    batch_id, ids = a_batch(database, *[bundle(f"/models/{n}") for n in range(5)])
    stop_at = time.monotonic() + 2.5
    failures: list[BaseException] = []

    def repeat(act: Callable[[], None]) -> None:
        try:
            while time.monotonic() < stop_at:
                act()
        except BaseException as error:
            failures.append(error)

    def work(worker: int) -> None:
        tokens = claim(database, random.sample(ids, len(ids)), worker)
        with database.write() as session:
            jobs.heartbeat(session, tokens, 60.0)
        with database.write() as session:
            jobs.hand_back(session, tokens, alone=True)

    def cancel_and_retry() -> None:
        with database.write() as session:
            jobs.cancel(session, batch_ids=[batch_id])
        with database.write() as session:
            jobs.retry(session, batch_ids=[batch_id])

    def top_up_and_scan() -> None:
        with database.write() as session:
            window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=4)
        with database.write() as session:
            window.record_scan(session, missing=list(window.waiting_messages(session)), present=[])

    acts: list[Callable[[], None]] = [partial(work, a_worker(database, f"w{n}")) for n in range(3)]
    threads = [threading.Thread(target=repeat, args=(act,)) for act in (*acts, cancel_and_retry, top_up_and_scan)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("rows", [1, 3], ids=["after one row", "after many"])
def test_what_a_frozen_writer_locked_is_free_again_after_a_while(
    postgresql_database: Database, postgresql_url: str, rows: int
) -> None:
    """As a host leaves it that loses its power within a transaction: PostgreSQL hears no more of it."""
    database = postgresql_database
    _, ids = a_batch(database)
    tokens = claim(database, ids, a_worker(database), lease_s=-3600.0)
    worker = Database(postgresql_url, frozen_s=3.0)

    def expire() -> list[int]:
        with database.write() as session:
            return jobs.expire(session, **POLICY)

    def lock_and_freeze() -> None:
        with worker.write() as frozen:
            jobs.heartbeat(frozen, tokens, -3600.0)
            frozen.execute(text("UPDATE jobs SET stage = :stage"), [{"stage": "loading"}] * rows)
            until(lambda: expire() == ids, "end of its locks", timeout_s=50.0)

    with pytest.raises(DatabaseUnreachable):
        lock_and_freeze()
    worker.dispose()
    assert set(states(database).values()) == {JobState.QUEUED}


def test_what_a_stopped_command_has_locked_is_free_again_too(postgresql_url: str, tmp_path: Path) -> None:
    environ = {"QBATCH_HOME": str(tmp_path), "QBATCH_DATABASE_URL": postgresql_url, "QBATCH_LEASE_S": "30"}
    database = connect(Settings.from_env(environ))
    with database.write() as session:
        assert session.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one() == "30s"
    database.dispose()


def test_two_device_errors_in_a_row_quarantine_the_worker(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    for _ in range(2):
        time.sleep(0.05)
        (token,) = claim(database, ids, worker)
        fail(database, token, DeviceError("illegal memory access"))
    with database.read() as session:
        row = session.get_one(Worker, worker)
        assert row.state == "quarantined"
        assert "illegal memory access" in (row.note or "")
        assert not workers.live(session, 60.0)


def test_a_job_that_failed_here_is_left_to_another_worker(database: Database) -> None:
    here = a_worker(database, "here")
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    (token,) = claim(database, ids, here)
    fail(database, token, WorkerLost("gone"))
    time.sleep(0.05)
    there = a_worker(database, "there")
    assert claim(database, ids, here) == []
    assert claim(database, ids, there) == [(ids[0], 2)]


def test_a_job_that_failed_here_is_not_left_to_a_busy_worker_for_ever(database: Database) -> None:
    here, there = a_worker(database, "here"), a_worker(database, "there")
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    (token,) = claim(database, ids, here)
    fail(database, token, WorkerLost("gone"))
    time.sleep(1.1)
    assert claim(database, ids, here, lease_s=60.0) == []
    with database.write() as session:
        workers.beat(session, there)
    assert claim(database, ids, here, lease_s=1.0) == [(ids[0], 2)]


def test_a_job_that_failed_on_the_only_worker_comes_back_to_it(database: Database) -> None:
    here = a_worker(database, "here")
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    (token,) = claim(database, ids, here)
    fail(database, token, WorkerLost("gone"))
    time.sleep(0.05)
    assert claim(database, ids, here) == [(ids[0], 2)]


def test_where_many_failures_are_allowed_no_wait_is_longer_than_an_hour(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", Method.NF4))
    claim(database, ids, worker)
    with database.write() as session:
        session.execute(update(Job).values(failures=40))
        jobs.fail(
            session,
            (ids[0], 1),
            WorkerLost("gone"),
            lease_s=60.0,
            limits=RetryLimits(backoff_s=10.0, max_failures=1000),
        )
    with database.read() as session:
        soon = select(Job.id).where(Job.not_before > db_now(3500.0), Job.not_before <= db_now(3600.0))
        assert session.scalars(soon).all() == ids


def test_cancel_fences_a_running_attempt_and_retry_starts_afresh(database: Database) -> None:
    worker = a_worker(database)
    batch_id, ids = a_batch(database)
    (token, *_) = claim(database, ids, worker)
    with database.write() as session:
        assert jobs.cancel(session, batch_ids=[batch_id]) == ids
        assert jobs.cancel(session, batch_ids=[batch_id]) == []
    assert not succeed(database, token)
    assert set(states(database).values()) == {JobState.CANCELLED}
    with database.write() as session:
        assert jobs.retry(session, job_ids=ids[:1]) == ids[:1]
    assert claim(database, ids, worker) == [(ids[0], 2)]


def test_hand_back_charges_nothing(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database)
    tokens = claim(database, ids, worker)
    with database.write() as session:
        jobs.note(session, tokens[0], work_started=True)
        jobs.hand_back(session, tokens)
    assert [a_job(database, job_id).failures for job_id in ids] == [0, 0, 0]
    assert len(claim(database, ids, worker)) == 3


def test_the_window_takes_the_highest_priority_first_then_shares(database: Database) -> None:
    first, _ = a_batch(database, *[bundle(f"/a/{n}") for n in range(5)])
    second, _ = a_batch(database, *[bundle(f"/b/{n}") for n in range(5)])
    urgent, _ = a_batch(database, bundle("/c/0"), priority=5)
    with database.write() as session:
        chosen = window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=5)
    batches = [a_job(database, dispatch.job_ids[0]).batch_id for dispatch in chosen]
    assert batches == [urgent, first, second, first, second]
    with database.write() as session:
        assert window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=5) == []
        assert window.choose(session, kind=DeviceKind.CUDA, queue="cuda", slots=5) == [], "these jobs want a CPU"


def test_an_urgent_bundle_enters_a_full_window(database: Database) -> None:
    a_batch(database, *[bundle(f"/a/{n}") for n in range(5)])
    with database.write() as session:
        assert len(window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=2)) == 2
    _, ids = a_batch(database, bundle("/c/0"), priority=1)
    with database.write() as session:
        (dispatch,) = window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=2)
    assert list(dispatch.job_ids) == ids


def test_a_checkpoint_in_flight_is_not_dispatched_again(database: Database) -> None:
    def wants(model: str) -> list[NewJob]:
        return [NewJob(spec=spec(model), bits=4, checkpoint_key="k" * 64)]

    _, ids = a_batch(database, wants("/a"))
    a_batch(database, wants("/a"))
    worker = a_worker(database)
    with database.write() as session:
        assert len(window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=4)) == 1
    (token,) = claim(database, ids, worker)
    with database.write() as session:
        assert window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=4) == []
    succeed(database, token)
    with database.write() as session:
        assert len(window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=4)) == 1


def test_a_message_missed_by_two_scans_is_sent_again(database: Database) -> None:
    a_batch(database)
    with database.write() as session:
        (sent,) = window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=1)
    for missing, present, gone in (
        ([sent.dispatch_id], [], []),
        ([], [sent.dispatch_id], []),
        ([sent.dispatch_id], [], []),
        ([sent.dispatch_id], [], [sent.dispatch_id]),
    ):
        with database.write() as session:
            assert window.record_scan(session, missing=missing, present=present) == gone
    with database.write() as session:
        (again,) = window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=1)
    assert again.job_ids == sent.job_ids
    assert again.dispatch_id != sent.dispatch_id


def test_a_result_stands_under_the_key_of_what_was_measured(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, [NewJob(spec=spec(), bits=4, checkpoint_key="of what lay there at submit")])
    (token,) = claim(database, ids, worker)
    found = replace(measured(), details=Details(checkpoint_key="of what was used"))
    with database.write() as session:
        protocol = PROTOCOL.for_device(DeviceKind.CPU)
        assert jobs.succeed(session, token, found, protocol=protocol, checkpoint_path="checkpoints/x")
    assert a_job(database, ids[0]).checkpoint_key == "of what was used"


def test_a_source_that_changed_leaves_its_bundle_together(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database)
    for token in claim(database, ids, worker):
        assert fail(database, token, SourceChanged("model.safetensors changed while it was used"))
    assert len({a_job(database, job_id).bundle for job_id in ids}) == 1
    assert {a_job(database, job_id).state for job_id in ids} == {"queued"}


def test_a_finished_job_is_found_by_checkpoint_and_protocol(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, [NewJob(spec=spec(), bits=4, checkpoint_key="k" * 64)])
    (token,) = claim(database, ids, worker)
    succeed(database, token)
    protocol_hash = PROTOCOL.for_device(DeviceKind.CPU).hash
    with database.read() as session:
        for names, found in ((None, ids[0]), (["a CPU"], ids[0]), (["a GPU"], None)):
            answer = finished_results.find_finished(session, {("k" * 64, protocol_hash)}, device_names=names)
            assert [one.job_id for one in answer.values()] == ([] if found is None else [found])
    answered, _ = a_batch(database, [NewJob(spec=spec(), bits=4, checkpoint_key="k" * 64, reused_from=ids[0])])
    with database.read() as session:
        (row,) = results.find_results(session, batch_ids=[answered])
    assert (row.state, row.reused_from, row.disk_bytes) == ("succeeded", f"j{ids[0]}", 10)


def test_a_result_that_lacks_what_may_yet_be_measured_answers_nobody(database: Database) -> None:
    """An older one that has it does."""
    worker, pair = a_worker(database), ("k" * 64, PROTOCOL.for_device(DeviceKind.CPU).hash)

    def answer_after(incomplete: bool | None) -> int | None:
        _, ids = a_batch(database, [NewJob(spec=spec(), bits=4, checkpoint_key="k" * 64)])
        (token,) = claim(database, ids, worker)
        with database.write() as session:
            found = replace(measured(), details=Details(incomplete=incomplete))
            assert jobs.succeed(
                session, token, found, protocol=PROTOCOL.for_device(DeviceKind.CPU), checkpoint_path="checkpoints/x"
            )
        with database.read() as session:
            answer = finished_results.find_finished(session, {pair}, device_names=None).get(pair)
        return None if answer is None else answer.job_id - ids[0]

    assert [answer_after(True), answer_after(None), answer_after(True), answer_after(False)] == [None, 0, -1, 0]


def ran_out_of_memory(database: Database, gpu: int, **of: Any) -> int:
    """A job that did so on this worker."""
    _, (job_id,) = a_batch(database, bundle("/models/a", Method.NF4, device=DeviceKind.CUDA, **of))
    (token,) = claim(database, [job_id], gpu)
    assert fail(database, token, CudaOom("cannot load a: CUDA out of memory"))
    return job_id


def give_up(database: Database) -> list[int]:
    with database.write() as session:
        return jobs.give_up_too_large(session, 60.0)


def retry(database: Database, job_id: int) -> None:
    with database.write() as session:
        assert jobs.retry(session, job_ids=[job_id]) == [job_id]


def change(database: Database, worker_id: int, **values: Any) -> None:
    with database.write() as session:
        session.execute(update(Worker).where(Worker.id == worker_id).values(**values))


def test_out_of_memory_on_the_largest_gpu_fails_and_says_what_it_needs(database: Database) -> None:
    small = a_gpu(database, 22.5)
    # Another card sold as 24 GB is no larger, whatever its last gibibyte.
    a_gpu(database, 24.0)
    job = a_job(database, ran_out_of_memory(database, small))
    assert (job.state, job.error_kind, job.failures) == (JobState.FAILED, "cuda_oom", 0)
    assert job.above_memory_bytes == int(22.5 * GIB)
    assert job.error_message == (
        "cannot load a: CUDA out of memory; it needs a GPU of more than 24 GiB, and no live worker has one"
    )


def test_out_of_memory_sends_a_job_alone_to_a_larger_gpu_uncharged(database: Database) -> None:
    small, twin, large = (a_gpu(database, gib) for gib in (22.5, 24.0, 79.6))
    _, ids = a_batch(database, bundle(device=DeviceKind.CUDA))
    (token, *_) = claim(database, ids, small)
    assert fail(database, token, CudaOom("CUDA out of memory"))
    job = a_job(database, ids[0])
    assert (job.state, job.failures, job.above_memory_bytes) == (JobState.QUEUED, 0, int(22.5 * GIB))
    assert job.bundle not in {a_job(database, job_id).bundle for job_id in ids[1:]}
    with database.read() as session:
        (row,) = (row for row in listing.list_jobs(session) if row["job_id"] == f"j{ids[0]}")
    assert row["note"] == "needs a GPU of more than 24 GiB"
    assert claim(database, ids, small) == claim(database, ids, twin) == []
    assert claim(database, ids, large) == [(ids[0], 2)]


def test_workers_are_listed_with_the_class_of_their_gpu(database: Database) -> None:
    a_gpu(database, 22.5)
    a_gpu(database, 140.4)
    a_worker(database, memory_bytes=512 * GIB)
    with database.read() as session:
        assert [row["vram_class"] for row in listing.list_workers(session, 60.0)] == [24, 141, None]


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ({"state": "quarantined"}, True),
        ({"heartbeat_at": db_now(-121.0)}, True),
        # It may be back in a moment, as when nobody could reach the database; for how long is the scheduler's to say.
        ({"state": "stopped"}, False),
        ({"heartbeat_at": db_now(-90.0)}, False),
    ],
    ids=["quarantined", "gone", "stopped", "silent"],
)
def test_a_larger_gpu_that_is_not_around_is_none(database: Database, values: dict[str, Any], ends: bool) -> None:
    small, large = a_gpu(database, 24), a_gpu(database, 80)
    change(database, large, **values)
    state = a_job(database, ran_out_of_memory(database, small)).state
    assert state == (JobState.FAILED if ends else JobState.QUEUED)


def test_a_worker_claims_no_job_for_another_kind_of_device(database: Database) -> None:
    _, ids = a_batch(database, bundle("/models/a", Method.NF4, device=DeviceKind.CUDA))
    assert claim(database, ids, a_worker(database)) == []
    assert claim(database, ids, a_gpu(database, 24)) == [(ids[0], 1)]
    _, ids = a_batch(database, bundle("/models/a", Method.NF4, device=DeviceKind.AUTO))
    assert claim(database, ids, a_worker(database, "w2")) == [(ids[0], 1)]


def test_a_retry_remembers_which_gpu_was_too_small(database: Database) -> None:
    small = a_gpu(database, 24)
    job_id = ran_out_of_memory(database, small)
    retry(database, job_id)
    assert claim(database, [job_id], small) == []
    assert give_up(database) == [job_id]
    job = a_job(database, job_id)
    assert (job.state, job.error_kind) == (JobState.FAILED, "cuda_oom")
    assert job.error_message == "needs a GPU of more than 24 GiB, and no live worker has one"
    assert (job.queue, job.dispatch_id, job.finished_at is None) == (None, None, False)
    retry(database, job_id)
    large = a_gpu(database, 80)
    assert give_up(database) == []
    assert claim(database, [job_id], small) == []
    assert claim(database, [job_id], large) == [(job_id, 2)]


def test_a_larger_gpu_that_restarts_is_waited_for_and_not_for_ever(database: Database) -> None:
    small, large = a_gpu(database, 24), a_gpu(database, 80)
    job_id = ran_out_of_memory(database, small)
    change(database, large, state="stopped")
    assert give_up(database) == []
    change(database, large, heartbeat_at=db_now(-121.0))
    assert give_up(database) == [job_id]


def test_without_any_gpu_worker_a_job_waits_for_one(database: Database) -> None:
    small = a_gpu(database, 24)
    job_id = ran_out_of_memory(database, small)
    retry(database, job_id)
    change(database, small, heartbeat_at=db_now(-121.0))
    a_worker(database, "a CPU")
    assert give_up(database) == []


def test_a_prediction_forbids_nothing_and_gives_way_to_what_is_seen(database: Database) -> None:
    small = a_gpu(database, 24)
    _, ids = a_batch(database, bundle("/a", Method.NF4, device=DeviceKind.CUDA, needs={Method.NF4: 90 * GIB}))
    assert give_up(database) == []
    (token,) = claim(database, ids, small)
    fail(database, token, CudaOom("CUDA out of memory"))
    retry(database, ids[0])
    assert claim(database, ids, a_gpu(database, 48)) == [(ids[0], 2)]


def test_what_ran_out_of_a_gpus_memory_is_not_for_a_cpu(database: Database) -> None:
    small, cpu = a_gpu(database, 24), a_worker(database, memory_bytes=512 * GIB)
    a_gpu(database, 80)
    job_id = ran_out_of_memory(database, small)
    assert claim(database, [job_id], cpu) == []


def test_a_job_that_failed_on_the_only_gpu_large_enough_comes_back_to_it(database: Database) -> None:
    small, large = a_gpu(database, 24), a_gpu(database, 80)
    job_id = ran_out_of_memory(database, small)
    (token,) = claim(database, [job_id], large)
    fail(database, token, WorkerLost("gone"))
    time.sleep(0.05)
    assert claim(database, [job_id], large) == [(job_id, 3)]


def test_two_submits_may_bring_the_same_text_at_once(database: Database) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def bring() -> None:
        start.wait()
        try:
            with database.write() as session:
                add_text(session, "a" * 64, "x")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=bring) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_text_is_kept_once_by_its_hash(database: Database) -> None:
    for _ in range(2):
        with database.write() as session:
            add_text(session, "a" * 64, "héllo")
    with database.read() as session:
        assert text_content(session, "a" * 64) == "héllo"
        with pytest.raises(KeyError):
            text_content(session, "b" * 64)
