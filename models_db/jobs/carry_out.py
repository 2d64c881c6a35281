"""Applies the retry policy to a running job: collects the facts that it needs, and carries out its decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState, Stage, format_job_id
from qbatch.core.errors import DiskFull, JobError
from qbatch.core.retry_policy import Again, JobFacts, PastAttempt, RetryDecision, RetryLimits, decide
from qbatch.models_db import pauses
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.jobs.device_blame import blame_device
from qbatch.models_db.jobs.ending import end
from qbatch.models_db.jobs.transitions import requeue, text_of
from qbatch.models_db.tables import Attempt, Job


def end_badly(
    session: Session, job: Job, error: JobError, limits: RetryLimits, *, no_larger_gpu: str | None = None
) -> None:
    """End a running attempt with ``error``: its job fails or is queued again. ``no_larger_gpu``: see ``JobFacts``."""
    decision = decide(error, _facts(session, job, no_larger_gpu), limits)
    job.failures += decision.charged
    if decision.blames_device:
        blame_device(session, job, error)
    match decision.again:
        case Again.NEVER:
            end(session, job, JobState.FAILED, decision.error, attempt_error=error, cut_short=decision.cut_short)
            return
        case Again.AFTER_BACKOFF:
            job.not_before = db_now(decision.wait_s)
            job.avoid_worker_id = job.worker_id
        case Again.WHEN_THERE_IS_ROOM:
            _pause_for_room(session, job, error, decision.wait_s)
            job.not_before = None
            job.avoid_worker_id = None
        case Again.ON_A_LARGER_GPU:
            pass
        case _:
            assert_never(decision.again)
    _requeue(session, job, error, decision)


def _requeue(session: Session, job: Job, error: JobError, decision: RetryDecision) -> None:
    job.error_kind = error.kind
    job.error_message = text_of(error)
    requeue(session, job, outcome=error.kind, alone=decision.alone, error=error, cut_short=decision.cut_short)


def _facts(session: Session, job: Job, no_larger_gpu: str | None) -> JobFacts:
    return JobFacts(
        attempt=job.attempt,
        failures=job.failures,
        last_error_kind=job.error_kind,
        is_fetching=job.stage == Stage.FETCHING,
        work_started=job.work_started,
        earlier=_earlier(session, job),
        no_larger_gpu=no_larger_gpu,
    )


def _earlier(session: Session, job: Job) -> Sequence[PastAttempt]:
    query = (
        select(Attempt.attempt, Attempt.outcome, Attempt.cut_short)
        .where(Attempt.job_id == job.id, Attempt.attempt < job.attempt, Attempt.attempt > job.forgiven_attempt)
        .order_by(Attempt.attempt.desc())
    )
    return [
        PastAttempt(number=number, outcome=outcome, was_cut_short=bool(cut_short))
        for number, outcome, cut_short in session.execute(query)
    ]


def _pause_for_room(session: Session, job: Job, error: JobError, for_s: float) -> None:
    needed_bytes = error.needed_bytes if isinstance(error, DiskFull) else None
    message = f"{format_job_id(job.id)}: {text_of(error)}"
    pauses.pause(session, pauses.STORAGE_FULL, message, needed_bytes=needed_bytes, for_s=for_s)
