"""The end of a job, and what follows from it for others."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState
from qbatch.core.errors import JobError
from qbatch.models_db.jobs.searching import advance, fail_with, waits_for_points
from qbatch.models_db.jobs.transitions import close
from qbatch.models_db.tables import Job


def end(
    session: Session,
    job: Job,
    state: JobState,
    error: JobError | None = None,
    *,
    attempt_error: JobError | None = None,
    cut_short: bool = False,
) -> None:
    """End a job in ``state``, and go on with the search that it publishes a mixture for. ``attempt_error`` is the error
    of the attempt, if it differs from the job's."""
    close(session, job, state, error, attempt_error=attempt_error, cut_short=cut_short)
    search = _search_of(session, job)
    if search is None or not waits_for_points(search):
        return
    if state is JobState.SUCCEEDED:
        advance(session, search)
    elif search.state == JobState.QUEUED:
        fail_with(session, search, job)


def _search_of(session: Session, job: Job) -> Job | None:
    if job.search_job_id is None:
        return None
    # It was locked before the job was: see ``lock_with_searches``.
    return session.scalars(
        select(Job).where(Job.id == job.search_job_id), execution_options={"populate_existing": True}
    ).one_or_none()
