"""What ends because its time is over: leases that nobody renewed, jobs that no GPU is large enough for."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, and_, select, update
from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, JobState
from qbatch.core.errors import CudaOom, WorkerLost
from qbatch.core.retry_policy import EXPIRED, RetryLimits, longest_wait_s
from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.jobs.carry_out import end_badly
from qbatch.models_db.jobs.transitions import end, requeue
from qbatch.models_db.memory_need import seen_too_large_for
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Job, Worker
from qbatch.models_db.vram import no_larger, usable_bytes
from qbatch.models_db.workers import around


def expire(session: Session, *, backoff_s: float, max_failures: int, worker_id: int | None = None) -> list[int]:
    """Take back the jobs whose lease ran out, or all those of a worker that is dead for certain.

    Only work that had started is charged.
    """
    limits = RetryLimits(backoff_s=backoff_s, max_failures=max_failures)
    gone = Job.lease_expires_at < db_now() if worker_id is None else Job.worker_id == worker_id
    lost = session.scalars(
        select(Job).where(Job.state == JobState.RUNNING, gone).order_by(Job.id).with_for_update(skip_locked=True)
    ).all()
    for job in lost:
        if job.work_started:
            error = WorkerLost(f"worker {job.worker_id} died, or was silent for longer than its lease")
            end_badly(session, job, error, limits)
        else:
            requeue(session, job, outcome=EXPIRED, alone=True)
    return [job.id for job in lost]


def give_up_too_large(session: Session, lease_s: float) -> list[int]:
    """Fail the queued jobs that ran out of memory on a GPU, where no larger one was heard of within two leases.

    Without any GPU worker they wait, as all jobs do.
    """
    rooms = [usable_bytes(worker) for worker, _ in around(session, lease_s) if worker.device_kind == DeviceKind.CUDA]
    if not rooms:
        return []
    too_large = and_(Job.state == JobState.QUEUED, seen_too_large_for(max(rooms)))
    found = session.scalars(
        select(Job).where(too_large).order_by(Job.id).with_for_update(skip_locked=True, of=Job)
    ).all()
    for job in found:
        end(session, job, JobState.FAILED, CudaOom(no_larger(job.above_memory_bytes or 0)))
    return [job.id for job in found]


def mend_times(session: Session, *, lease_s: float, backoff_s: float, max_failures: int) -> int:
    """Cut what ends later than anything that is given now, since the database's clock was set back: leases whose worker
    is not there to renew them, and backoffs. How many there were."""
    limits = RetryLimits(backoff_s=backoff_s, max_failures=max_failures)
    heard_of = and_(Worker.heartbeat_at >= db_now(-lease_s), Worker.heartbeat_at <= db_now(SLACK_S))
    abandoned = and_(
        Job.state == JobState.RUNNING,
        Job.lease_expires_at > db_now(lease_s + SLACK_S),
        # One that lives renews it, and may have been set to longer leases.
        Job.worker_id.not_in(select(Worker.id).where(heard_of)),
    )
    count = _cut(session, abandoned, Job.lease_expires_at, lease_s)
    waits = and_(Job.state == JobState.QUEUED, Job.not_before > db_now(backoff_s + SLACK_S))
    for failures, kind in session.execute(select(Job.failures, Job.error_kind).where(waits).distinct()).all():
        longest_s = longest_wait_s(failures, kind, limits)
        alike = and_(waits, Job.failures == failures, Job.error_kind.is_not_distinct_from(kind))
        too_long = and_(alike, Job.not_before > db_now(longest_s + SLACK_S))
        count += _cut(session, too_long, Job.not_before, longest_s)
    return count


def _cut(session: Session, which: ColumnElement[bool], column: Any, to_s: float) -> int:
    query = select(Job.id).where(which).order_by(Job.id).with_for_update(skip_locked=True, of=Job)
    ids = session.scalars(query).all()
    for job_id in ids:
        session.execute(update(Job).where(Job.id == job_id).values({column: db_now(to_s)}), execution_options=NO_SYNC)
    return len(ids)
