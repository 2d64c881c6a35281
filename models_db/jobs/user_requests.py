"""Cancels and retries jobs at a user's request."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import and_, select, update
from sqlalchemy.orm import Session

from qbatch.core.domain import ENDED_STATES, JobState
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.jobs.transitions import lock
from qbatch.models_db.named_jobs import is_named
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Attempt, Job
from qbatch.models_db.window import NO_MESSAGE


def cancel(session: Session, *, batch_ids: Sequence[int] = (), job_ids: Sequence[int] = ()) -> list[int]:
    """Cancel the jobs that have not ended, and return their ids. The worker of a running job notices that it no longer
    holds the job, and kills the runner.

    With a search go the jobs that publish its mixtures, and with one of those the search.
    """
    named = _with_their_searches(session, job_ids)
    while True:
        open_ = and_(is_named(batch_ids, named), Job.state.not_in(ENDED_STATES))
        lock(session, open_)
        # Again once they are locked: until then the end of one may have added the next.
        if (found := _with_their_searches(session, named)) == named:
            break
        named = found
    # Only these have an attempt that is not over, and they are few: a batch may have a hundred thousand that wait.
    running = select(Job.id).where(is_named(batch_ids, named), Job.state == JobState.RUNNING)
    session.execute(
        update(Attempt)
        .where(Attempt.job_id.in_(running), Attempt.ended_at.is_(None))
        .values(ended_at=db_now(), outcome=JobState.CANCELLED),
        execution_options=NO_SYNC,
    )
    # Selected by condition instead of ids: a batch may have more jobs than a statement may have parameters.
    rows = session.execute(
        update(Job)
        .where(open_)
        .values(
            state=JobState.CANCELLED,
            error_kind=None,
            error_message=None,
            lease_expires_at=None,
            finished_at=db_now(),
            **NO_MESSAGE,
        )
        .returning(Job.id),
        execution_options=NO_SYNC,
    ).scalars()
    return sorted(rows)


def retry(session: Session, *, batch_ids: Sequence[int] = (), job_ids: Sequence[int] = ()) -> list[int]:
    """Queue failed and cancelled jobs again with no failures, and return their ids. Attempt numbers continue, and GPU
    memory that was too small stays recorded. What a search found answers it again, and it goes on from there."""
    over = and_(is_named(batch_ids, job_ids), Job.state.in_((JobState.FAILED, JobState.CANCELLED)))
    lock(session, over)
    rows = session.execute(
        update(Job)
        .where(over)
        .values(
            state=JobState.QUEUED,
            stage=None,
            failures=0,
            forgiven_attempt=Job.attempt,
            error_kind=None,
            error_message=None,
            finished_at=None,
            not_before=None,
            avoid_worker_id=None,
            progress=None,
            search_id=None,
            # A search that was forced and has found something is not made again: its points are of what it found.
            force=and_(Job.force, Job.search_id.is_(None)),
            **NO_MESSAGE,
        )
        .returning(Job.id),
        execution_options=NO_SYNC,
    ).scalars()
    return sorted(rows)


def _with_their_searches(session: Session, job_ids: Sequence[int]) -> list[int]:
    of_search = select(Job.id).where(Job.search_job_id.in_(job_ids))
    of_point = select(Job.search_job_id).where(Job.id.in_(job_ids), Job.search_job_id.is_not(None))
    others = {found for query in (of_search, of_point) for found in session.scalars(query) if found is not None}
    return sorted({*job_ids, *others})
