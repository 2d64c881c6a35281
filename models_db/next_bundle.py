"""Which bundle a worker will probably get next. Nothing here claims or changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState, SourceRef
from qbatch.models_db.batches import spec_of
from qbatch.models_db.tables import Job, Worker
from qbatch.models_db.window import IS_DISPATCHED
from qbatch.models_db.workers import live


@dataclass(frozen=True, slots=True, kw_only=True)
class NextBundle:
    """A bundle that stands in a queue: one of its jobs, and what is to be fetched for it."""

    job_id: int
    source: SourceRef
    allow_pickle: bool


def find_next_bundle(session: Session, queues: Sequence[str], *, worker_id: int, lease_s: float) -> NextBundle | None:
    """The bundle that the worker, which reads ``queues`` in that order, will probably get next.

    Of several live workers with such a device, the first expects the first bundle, the second the second. None if there
    are fewer bundles.
    """
    rows = session.execute(
        select(func.min(Job.id), Job.priority, Job.queue)
        .where(IS_DISPATCHED, Job.queue.in_(queues))
        .group_by(Job.dispatch_id, Job.priority, Job.queue)
    ).all()
    order = sorted((-priority, queues.index(queue), job_id) for job_id, priority, queue in rows if queue is not None)
    kind = session.get_one(Worker, worker_id).device_kind
    before = sum(other.id < worker_id for other in live(session, lease_s) if other.device_kind == kind)
    if before >= len(order):
        return None
    job = session.get_one(Job, order[before][-1])
    return NextBundle(job_id=job.id, source=spec_of(job).source, allow_pickle=job.allow_pickle)


def is_worth_fetching(session: Session, job_id: int, *, worker_id: int) -> bool:
    """Whether the job still waits, or waits for what is being downloaded: it is run by a worker of the same host, which
    uses the same cache of sources. A folder is not downloaded: whoever runs its job reads it at once."""
    job = session.get(Job, job_id, populate_existing=True)
    if job is None or job.state != JobState.RUNNING or job.worker_id is None:
        return job is not None and job.state == JobState.QUEUED
    if job.is_folder:
        return False
    return session.get_one(Worker, job.worker_id).host == session.get_one(Worker, worker_id).host
