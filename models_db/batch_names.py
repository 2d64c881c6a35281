"""What people call batches, jobs and models by: names, and the newest."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.models_db.tables import Batch, Job


def newest_batch(session: Session) -> int | None:
    """The id of the batch that was submitted last; None if there is none."""
    return session.scalars(select(Batch.id).order_by(Batch.id.desc()).limit(1)).first()


def batches_named(session: Session, name: str) -> list[int]:
    """The ids of the batches with that name, oldest first."""
    return list(session.scalars(select(Batch.id).where(Batch.name == name).order_by(Batch.id)))


def newest_batches(session: Session, limit: int) -> list[tuple[int, str | None]]:
    """The ids and names of the newest ``limit`` batches, newest first."""
    query = select(Batch.id, Batch.name).order_by(Batch.id.desc()).limit(limit)
    return [(batch_id, name) for batch_id, name in session.execute(query)]


def newest_models(session: Session, limit: int) -> list[str]:
    """The models of the newest ``limit`` jobs, each once, by name."""
    newest = select(Job.model).order_by(Job.id.desc()).limit(limit).subquery()
    return list(session.scalars(select(newest.c.model).distinct().order_by(newest.c.model)))


def newest_jobs(session: Session, limit: int) -> list[tuple[int, str, str]]:
    """The id, model and method of the newest ``limit`` jobs, newest first."""
    query = select(Job.id, Job.model, Job.method).order_by(Job.id.desc()).limit(limit)
    return [(job_id, model, method) for job_id, model, method in session.execute(query)]
