"""Which device is to blame for the errors of devices, and is taken out of service."""

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
    """Quarantine the worker at its second device error in a row. The error of a model that failed on another worker's
    device too does not count: it may be the model's doing, which would cost the whole fleet, worker by worker."""
    worker = session.get(Worker, job.worker_id, with_for_update=True) if job.worker_id is not None else None
    if worker is None or _failed_elsewhere(session, job, error, worker):
        return
    worker.device_errors += 1
    if worker.device_errors >= QUARANTINED_AFTER:
        worker.state = WorkerState.QUARANTINED
        worker.note = f"two device errors in a row; the last: {text_of(error)}"


def _failed_elsewhere(session: Session, job: Job, error: JobError, worker: Worker) -> bool:
    other = aliased(Job)
    # A worker that was started again is another one on the same GPU.
    another = Worker.id != worker.id
    if worker.device_uuid is not None:
        another = Worker.device_uuid.is_distinct_from(worker.device_uuid)
    found = (
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
    return session.scalars(found.limit(1)).first() is not None


def clear_device(session: Session, worker_id: int | None) -> None:
    """A job succeeded on it: its errors are not in a row."""
    session.execute(
        update(Worker).where(Worker.id == worker_id, Worker.device_errors > 0).values(device_errors=0),
        execution_options=NO_SYNC,
    )
