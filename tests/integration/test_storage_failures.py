"""A job that storage fails in the middle of its work, again and again, ends; one that waits for room does not."""

from __future__ import annotations

from qbatch.core.domain import JobState, Method, Stage
from qbatch.core.errors import DeviceError, DiskFull, JobError, StorageError
from qbatch.core.retry_policy import RetryLimits
from qbatch.models_db import jobs
from qbatch.models_db.jobs import Token
from qbatch.models_db.session import Database
from tests.rows import a_batch, a_job, a_worker, bundle, claim

FULL = DiskFull("No space left on device (tokenizer.json)")
NO_ROOM = DiskFull("the checkpoint needs 11.2 MiB, and the storage has 4.0 MiB left", 11)


def begun(database: Database, job_id: int, stage: Stage = Stage.PUBLISHING) -> Token:
    """The next attempt of a job, its own work begun. A worker of its own: none waits for another's backoff."""
    (token,) = claim(database, [job_id], a_worker(database, f"w{a_job(database, job_id).attempt}"))
    with database.write() as session:
        jobs.note(session, token, stage=stage, work_started=True)
    return token


def fail(database: Database, token: Token, error: JobError) -> None:
    with database.write() as session:
        assert jobs.fail(session, token, error, lease_s=60.0, limits=RetryLimits(backoff_s=0.0, max_failures=3))


def a_job_of(database: Database) -> int:
    _, (job_id,) = a_batch(database, bundle("/models/a", Method.NF4))
    return job_id


def test_a_disk_that_fills_up_under_every_attempt_ends_the_job(database: Database) -> None:
    job_id = a_job_of(database)
    for _ in range(3):
        assert a_job(database, job_id).state == JobState.QUEUED
        fail(database, begun(database, job_id), FULL)
    job = a_job(database, job_id)
    assert (job.state, job.error_kind, job.failures) == (JobState.FAILED, "disk_full", 0)
    assert job.error_message == f"{FULL}; attempts 1, 2 and 3 in a row failed this way"


def test_a_job_waits_for_disk_space_without_a_limit(database: Database) -> None:
    job_id = a_job_of(database)
    for _ in range(12):
        fail(database, begun(database, job_id), NO_ROOM)
    job = a_job(database, job_id)
    assert (job.state, job.failures, job.attempt) == (JobState.QUEUED, 0, 12)


def test_uncharged_attempts_do_not_interrupt_a_series(database: Database) -> None:
    job_id = a_job_of(database)
    fail(database, begun(database, job_id), FULL)
    with database.write() as session:
        jobs.hand_back(session, [begun(database, job_id)])
    fail(database, begun(database, job_id), DeviceError("an illegal memory access"))
    fail(database, begun(database, job_id), NO_ROOM)
    fail(database, begun(database, job_id), FULL)
    (lost,) = claim(database, [job_id], a_worker(database, "lost"))
    fail(database, lost, FULL)
    assert a_job(database, job_id).state == JobState.QUEUED, "the last one's own work had not begun"
    fail(database, begun(database, job_id), FULL)
    assert a_job(database, job_id).error_message == f"{FULL}; attempts 1, 5 and 7 in a row failed this way"


def test_another_error_or_a_retry_restarts_the_count(database: Database) -> None:
    job_id = a_job_of(database)
    for error in (FULL, FULL, StorageError("Input/output error"), FULL, FULL):
        fail(database, begun(database, job_id), error)
    assert a_job(database, job_id).state == JobState.QUEUED
    fail(database, begun(database, job_id), FULL)
    assert a_job(database, job_id).state == JobState.FAILED
    with database.write() as session:
        jobs.retry(session, job_ids=[job_id])
    for _ in range(2):
        fail(database, begun(database, job_id), FULL)
    assert a_job(database, job_id).state == JobState.QUEUED


def test_a_job_that_storage_errors_end_says_which_attempts_met_them(database: Database) -> None:
    job_id = a_job_of(database)
    for _ in range(3):
        fail(database, begun(database, job_id), StorageError("Input/output error"))
    job = a_job(database, job_id)
    assert (job.state, job.failures) == (JobState.FAILED, 3)
    assert job.error_message == "Input/output error; attempts 1, 2 and 3 in a row failed this way"
