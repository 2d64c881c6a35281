"""How workers take queued jobs."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, false, func, or_, select, update
from sqlalchemy.orm import Session

from qbatch.core.domain import Claim, DeviceKind, JobState, Stage, WorkerState
from qbatch.models_db.batches import spec_of
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.few_jobs import IS_QUEUED
from qbatch.models_db.jobs.transitions import lock
from qbatch.models_db.memory_need import NEED_BYTES, may_run_in
from qbatch.models_db.ready_bundles import is_due
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Attempt, Job, Worker
from qbatch.models_db.usable_memory import usable_bytes
from qbatch.models_db.window import NO_MESSAGE
from qbatch.models_db.workers import is_live


def claim(session: Session, job_ids: Sequence[int], worker_id: int, lease_s: float) -> list[Claim]:
    """Claim those of ``job_ids`` that are queued and due; the baseline comes first. Two workers never get the same job.

    A job that failed on this worker is left to other live workers of the same device kind for the length of a lease. A
    job that ran out of memory on a GPU is left to GPUs of a larger class permanently.
    """
    allowed = _allowed(session, worker_id, lease_s)
    free = lock(session, Job.id.in_(job_ids), IS_QUEUED, is_due(), allowed)
    session.execute(
        update(Job)
        .where(Job.id.in_(free))
        .values(
            state=JobState.RUNNING,
            stage=Stage.FETCHING,
            attempt=Job.attempt + 1,
            work_started=False,
            progress=None,
            worker_id=worker_id,
            lease_expires_at=db_now(lease_s),
            started_at=func.coalesce(Job.started_at, db_now()),
            **NO_MESSAGE,
        ),
        execution_options=NO_SYNC,
    )
    taken = session.scalars(
        select(Job).where(Job.id.in_(free)).order_by(Job.bits.desc(), Job.id),
        execution_options={"populate_existing": True},
    ).all()
    session.add_all(Attempt(job_id=job.id, attempt=job.attempt, worker_id=worker_id) for job in taken)
    return [
        Claim(job_id=job.id, attempt=job.attempt, spec=spec_of(job), time_limit_s=job.time_limit_s) for job in taken
    ]


def _allowed(session: Session, worker_id: int, lease_s: float) -> ColumnElement[bool]:
    """The jobs that this worker may claim."""
    worker = session.get_one(Worker, worker_id, populate_existing=True)
    if worker.state == WorkerState.QUARANTINED:
        return false()
    another = select(Worker.id).where(
        is_live(lease_s),
        Worker.id != worker_id,
        Worker.device_kind == worker.device_kind,
        Worker.memory_bytes > NEED_BYTES,
    )
    # The job waits no longer than this for another worker, since the others may be busy for hours.
    has_waited = Job.not_before <= db_now(-lease_s)
    return and_(
        Job.device.in_((DeviceKind.AUTO, worker.device_kind)),
        may_run_in(usable_bytes(worker)),
        or_(
            Job.avoid_worker_id.is_(None),
            Job.avoid_worker_id != worker_id,
            ~another.correlate(Job).exists(),
            has_waited,
        ),
    )
