"""Ends attempts whose lease expired, and jobs for which no GPU is large enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, select, update
from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, JobState
from qbatch.core.errors import CudaOom, WorkerLost
from qbatch.core.retry_policy import EXPIRED, RetryLimits, longest_wait_s
from qbatch.core.vram_classes import no_larger
from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.few_jobs import WAITS_AGAIN
from qbatch.models_db.jobs.carry_out import end_badly
from qbatch.models_db.jobs.ending import end
from qbatch.models_db.jobs.transitions import lock_with_searches, requeue
from qbatch.models_db.memory_need import seen_too_large_for
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Job, Worker
from qbatch.models_db.usable_memory import usable_bytes
from qbatch.models_db.workers import around


def expire(session: Session, *, limits: RetryLimits, worker_id: int | None = None) -> list[int]:
    """End the attempts whose lease expired, or with ``worker_id`` all attempts of that worker, which must be dead.
    Returns the ids of their jobs.

    An attempt counts as a failure only if its work had started.
    """
    expired = Job.lease_expires_at < db_now() if worker_id is None else Job.worker_id == worker_id
    lost = _lock(session, Job.state == JobState.RUNNING, expired)
    for job in lost:
        if job.work_started:
            error = WorkerLost(f"worker {job.worker_id} died, or was silent for longer than its lease")
            end_badly(session, job, error, limits)
        else:
            requeue(session, job, outcome=EXPIRED, alone=True)
    return [job.id for job in lost]


def give_up_too_large(session: Session, lease_s: float) -> list[int]:
    """Fail the queued jobs that ran out of memory on a GPU, if no worker with a larger one sent a heartbeat within two
    leases. Returns their ids.

    If there is no GPU worker at all, they wait, as all jobs do.
    """
    usable = [usable_bytes(worker) for worker, _ in around(session, lease_s) if worker.device_kind == DeviceKind.CUDA]
    if not usable:
        return []
    too_large = and_(WAITS_AGAIN, seen_too_large_for(max(usable)))
    jobs = _lock(session, too_large)
    for job in jobs:
        end(session, job, JobState.FAILED, CudaOom(no_larger(job.above_memory_bytes or 0)))
    return [job.id for job in jobs]


def _lock(session: Session, *conditions: ColumnElement[bool]) -> Sequence[Job]:
    """The jobs that match, in the order of their ids, without those that another transaction is about to change. What
    their end may change besides is locked too."""
    # Without ORDER BY, because SQLite would read all jobs to return them in the order of their ids.
    held = lock_with_searches(session, session.scalars(select(Job.id).where(*conditions)).all(), skip_locked=True)
    # What another changed before it was locked may not match any more.
    query = select(Job).where(Job.id.in_(held), *conditions).order_by(Job.id)
    return session.scalars(query, execution_options={"populate_existing": True}).all() if held else []


def shorten_future_times(session: Session, *, lease_s: float, limits: RetryLimits) -> int:
    """Shorten leases and backoffs that end later than any given now could, because the database's clock was set back.
    Leases are shortened only if their worker is gone. Returns how many were changed."""
    alive = and_(Worker.heartbeat_at >= db_now(-lease_s), Worker.heartbeat_at <= db_now(SLACK_S))
    abandoned = and_(
        Job.state == JobState.RUNNING,
        Job.lease_expires_at > db_now(lease_s + SLACK_S),
        # A live worker renews its leases, and may be configured with longer ones.
        Job.worker_id.not_in(select(Worker.id).where(alive)),
    )
    count = _shorten(session, abandoned, Job.lease_expires_at, lease_s)
    waiting = and_(WAITS_AGAIN, Job.not_before > db_now(limits.backoff_s + SLACK_S))
    for failures, kind in session.execute(select(Job.failures, Job.error_kind).where(waiting).distinct()).all():
        longest_s = longest_wait_s(failures, kind, limits)
        alike = and_(waiting, Job.failures == failures, Job.error_kind.is_not_distinct_from(kind))
        too_long = and_(alike, Job.not_before > db_now(longest_s + SLACK_S))
        count += _shorten(session, too_long, Job.not_before, longest_s)
    return count


def _shorten(session: Session, which: ColumnElement[bool], column: Any, to_s: float) -> int:
    ids = session.scalars(select(Job.id).where(which).with_for_update(skip_locked=True, of=Job)).all()
    for job_id in ids:
        session.execute(update(Job).where(Job.id == job_id).values({column: db_now(to_s)}), execution_options=NO_SYNC)
    return len(ids)
