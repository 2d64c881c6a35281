"""Counts device errors of a worker, and puts it into quarantine after several in a row."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.orm import Session, aliased

from qbatch.core.domain import WorkerState
from qbatch.core.errors import JobError
from qbatch.core.retry_policy import QUARANTINED_AFTER
from qbatch.models_db.jobs.transitions import text_of
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Attempt, Job, Worker


def blame_device(session: Session, job: Job, error: JobError) -> None:
    """Quarantine the worker at its second device error in a row.

    An error does not count if the same model also failed on another worker's device: the model may be the cause, and
    would put one worker after the other into quarantine.
    """
    worker = session.get(Worker, job.worker_id, with_for_update=True) if job.worker_id is not None else None
    if worker is None or _failed_elsewhere(session, job, error, worker):
        return
    worker.device_errors += 1
    if worker.device_errors >= QUARANTINED_AFTER:
        worker.state = WorkerState.QUARANTINED
        worker.note = f"two device errors in a row; the last: {text_of(error)}"


def _failed_elsewhere(session: Session, job: Job, error: JobError, worker: Worker) -> bool:
    other = aliased(Job)
    # After a restart, the same GPU has a worker with another id, so GPUs are compared by UUID if it is known.
    another = Worker.id != worker.id
    if worker.device_uuid is not None:
        another = Worker.device_uuid.is_distinct_from(worker.device_uuid)
    failures_elsewhere = (
        select(Attempt.id)
        .join(other, other.id == Attempt.job_id)
        .join(Worker, Worker.id == Attempt.worker_id)
        .where(
            another,
            other.location == job.location,
            other.revision.is_not_distinct_from(job.revision),
            Attempt.outcome == error.kind,
        )
    )
    return session.scalars(failures_elsewhere.limit(1)).first() is not None


def clear_device(session: Session, worker_id: int | None) -> None:
    """Reset the worker's count of device errors in a row, after a job succeeded on it."""
    session.execute(
        update(Worker).where(Worker.id == worker_id, Worker.device_errors > 0).values(device_errors=0),
        execution_options=NO_SYNC,
    )
