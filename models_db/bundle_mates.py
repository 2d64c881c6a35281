"""Which jobs share a process: those that one worker runs, since it runs one bundle at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState
from qbatch.models_db.named_jobs import is_named
from qbatch.models_db.tables import Job


def running_workers(session: Session, *, batch_ids: Sequence[int] = (), job_ids: Sequence[int] = ()) -> set[int]:
    """The workers that run jobs among these now."""
    named = is_named(batch_ids, job_ids)
    found = session.scalars(select(Job.worker_id).where(named, Job.state == JobState.RUNNING).distinct())
    return {worker_id for worker_id in found if worker_id is not None}


def jobs_running_on(session: Session, worker_ids: Collection[int]) -> list[int]:
    """The jobs that these workers run now."""
    query = select(Job.id).where(Job.worker_id.in_(worker_ids), Job.state == JobState.RUNNING).order_by(Job.id)
    return list(session.scalars(query)) if worker_ids else []
