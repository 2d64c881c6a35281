"""Changes the state of one job. The caller must have locked the row."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState, Token
from qbatch.core.errors import JobError
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.ready_bundles import own_bundle
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Attempt, Job
from qbatch.models_db.window import NO_MESSAGE


def lock(session: Session, *conditions: ColumnElement[bool]) -> Sequence[int]:
    """Lock the rows that match, and return their ids. Rows are always locked in the same order, to avoid deadlocks."""
    return session.scalars(select(Job.id).where(*conditions).order_by(Job.id).with_for_update()).all()


def lock_with_searches(session: Session, job_ids: Collection[int], *, skip_locked: bool = False) -> set[int]:
    """Lock these jobs and the searches that they publish mixtures for, since the end of such a job may end its search
    too. Returns the ids of the jobs; with ``skip_locked`` without those that are, or whose search is, locked by others.

    A transaction that changes several jobs must lock all of them at once, before it changes one.
    """
    if not job_ids:
        return set()
    query = select(Job.id, Job.search_job_id).where(Job.id.in_(job_ids))
    needed = {job_id: {job_id, search or job_id} for job_id, search in session.execute(query)}
    rows = select(Job.id).where(Job.id.in_({*job_ids}.union(*needed.values())))
    held = set(session.scalars(rows.order_by(Job.id).with_for_update(skip_locked=skip_locked)))
    return {job_id for job_id, both in needed.items() if both <= held}


def locked(session: Session, token: Token, *states: JobState) -> Job | None:
    """Lock and return the job, if ``token`` is its newest attempt and it is in one of ``states``; else None.

    The search that it publishes a mixture for is locked before, since its end may end that too.
    """
    job_id, attempt = token
    search = select(Job.search_job_id).where(Job.id == job_id)
    if (search_job_id := session.execute(search).scalar_one_or_none()) is not None:
        lock(session, Job.id == search_job_id)
    return session.scalars(
        select(Job).where(Job.id == job_id, Job.attempt == attempt, Job.state.in_(states)).with_for_update(),
        execution_options={"populate_existing": True},
    ).one_or_none()


def close(
    session: Session,
    job: Job,
    state: JobState,
    error: JobError | None = None,
    *,
    attempt_error: JobError | None = None,
    cut_short: bool = False,
) -> None:
    """End a job in ``state``, and nothing else: see ``ending``."""
    _close_attempt(session, job, error.kind if error else state.value, attempt_error or error, cut_short)
    job.state = state
    job.error_kind = error.kind if error else None
    job.error_message = text_of(error)
    job.lease_expires_at = None
    job.finished_at = db_now()
    _forget_message(job)
    session.flush()


def requeue(
    session: Session,
    job: Job,
    *,
    outcome: str,
    alone: bool,
    error: JobError | None = None,
    cut_short: bool = False,
) -> None:
    """Put a job back into the queue. With ``alone``, it is sent in a message of its own from now on."""
    _close_attempt(session, job, outcome, error, cut_short)
    job.state = JobState.QUEUED
    job.stage = None
    job.progress = None
    job.lease_expires_at = None
    _forget_message(job)
    if alone:
        job.bundle = own_bundle(job.batch_id, job.id)
    session.flush()


def _forget_message(job: Job) -> None:
    for column, value in NO_MESSAGE.items():
        setattr(job, column, value)


def _close_attempt(session: Session, job: Job, outcome: str, error: JobError | None, cut_short: bool) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job.id, Attempt.attempt == job.attempt, Attempt.ended_at.is_(None))
        .values(ended_at=db_now(), outcome=outcome, message=text_of(error), cut_short=cut_short or None),
        execution_options=NO_SYNC,
    )


def text_of(error: JobError | None) -> str | None:
    # Errors contain no raw control characters, which matters because PostgreSQL cannot store NUL.
    return str(error) if error else None
