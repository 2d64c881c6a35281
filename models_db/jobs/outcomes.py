"""The end of an attempt: with a result, with an error, or given back to the queue."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.orm import Session

from qbatch.core.domain import JobState, Protocol, Token
from qbatch.core.errors import CudaOom, JobError
from qbatch.core.measured.measurement import MEASURED_COLUMNS, Measurement
from qbatch.core.retry_policy import HANDED_BACK, MAY_STILL_SUCCEED, RetryLimits
from qbatch.core.vram_classes import no_larger
from qbatch.models_db.jobs.carry_out import end_badly
from qbatch.models_db.jobs.device_blame import clear_device
from qbatch.models_db.jobs.ending import end
from qbatch.models_db.jobs.transitions import lock_with_searches, locked, requeue
from qbatch.models_db.memory_need import remember_too_small
from qbatch.models_db.question_answers import store_answers
from qbatch.models_db.tables import Job, Result, Worker
from qbatch.models_db.usable_memory import usable_bytes
from qbatch.models_db.workers import around


def succeed(
    session: Session,
    token: Token,
    measurement: Measurement,
    *,
    protocol: Protocol,
    checkpoint_path: str | None,
) -> bool:
    """Record a result. Returns whether it counts.

    It counts if no newer attempt was claimed and the job has not ended, or has failed only because the outcome of this
    attempt was unknown or could not be recorded.
    """
    job = _open_to_success(session, token)
    if job is None:
        return False
    # If the database was unreachable when the key was to be recorded, the row may have the key of an earlier content.
    job.checkpoint_key = measurement.details.checkpoint_key or job.checkpoint_key
    job.base_key = measurement.details.base_key or job.base_key
    session.add(
        Result(
            job_id=job.id,
            attempt=job.attempt,
            checkpoint_path=checkpoint_path,
            protocol=protocol.to_json(),
            protocol_hash=protocol.hash,
            **{name: getattr(measurement, name) for name in MEASURED_COLUMNS},
            details=measurement.details.to_json(),
            speed_key=measurement.details.speed_key,
        )
    )
    store_answers(session, job.id, measurement.answers or {})
    end(session, job, JobState.SUCCEEDED)
    clear_device(session, job.worker_id)
    return True


def answer(session: Session, token: Token, reused_from: int) -> bool:
    """End a job with the result of the earlier job ``reused_from``. Returns whether it counts, as ``succeed`` does."""
    job = _open_to_success(session, token)
    if job is None:
        return False
    job.reused_from = reused_from
    end(session, job, JobState.SUCCEEDED)
    return True


def answer_unclaimed(session: Session, job: Job, reused_from: int) -> None:
    """End a job that nobody can have claimed yet with the result of the earlier job ``reused_from``."""
    job.reused_from = reused_from
    end(session, job, JobState.SUCCEEDED)


def _open_to_success(session: Session, token: Token) -> Job | None:
    job = locked(session, token, JobState.RUNNING, JobState.QUEUED, JobState.FAILED)
    given_up = job is not None and job.state == JobState.FAILED
    # A failed job may still succeed if it failed because its outcome was unknown, or could not be recorded.
    return None if job is None or (given_up and job.error_kind not in MAY_STILL_SUCCEED) else job


def fail(session: Session, token: Token, error: JobError, *, limits: RetryLimits, lease_s: float) -> bool:
    """Apply the retry policy to a running attempt: fail the job, or queue it again. Returns False if the attempt no
    longer holds the job."""
    job = locked(session, token, JobState.RUNNING)
    if job is None:
        return False
    no_larger_gpu = _remember_too_small(session, job, lease_s) if isinstance(error, CudaOom) else None
    end_badly(session, job, error, limits, no_larger_gpu=no_larger_gpu)
    return True


def _remember_too_small(session: Session, job: Job, lease_s: float) -> str | None:
    """Record that the memory of the worker's GPU was too small. Returns a message if no current worker has a larger
    one, else None."""
    worker = session.get_one(Worker, job.worker_id)
    remember_too_small(job, worker)
    is_there = any(usable_bytes(other) > worker.memory_bytes for other, _ in around(session, lease_s))
    return None if is_there else no_larger(worker.memory_bytes)


def hand_back(session: Session, tokens: Iterable[Token], *, alone: bool = False) -> None:
    """Put the jobs of running attempts back into the queue, without counting a failure. With ``alone``, each job is
    sent in a message of its own from now on."""
    given = sorted(tokens)
    lock_with_searches(session, [job_id for job_id, _ in given])
    for token in given:
        job = locked(session, token, JobState.RUNNING)
        if job is not None:
            requeue(session, job, outcome=HANDED_BACK, alone=alone)
