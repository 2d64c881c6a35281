"""Lists of batches, jobs and workers as plain mappings, for display."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from qbatch.core.domain import LOST, OPEN_STATES, DeviceKind, JobState, WorkerState, format_batch_id, format_job_id
from qbatch.core.recovery import with_adapter_mark
from qbatch.core.vram_classes import show_need, vram_class
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.job_pages import first_jobs
from qbatch.models_db.memory_need import NeedSource, need_source
from qbatch.models_db.mixture_origins import MIXTURE_COLUMNS, awaited_jobs, mixture_origin
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import Attempt, Batch, Job, Worker
from qbatch.models_db.workers import is_live

# A list of more batches is for a program.
_MOST_ENDS = 50
_LAST_JOBS = 1000


def list_batches(session: Session, batch_ids: Sequence[int] = (), *, limit: int | None = None) -> list[dict[str, Any]]:
    """All batches, or the newest ``limit``, with the number of their jobs in each state, newest last."""
    query = select(Batch).order_by(Batch.id.desc()).limit(limit)
    if batch_ids:
        query = query.where(Batch.id.in_(batch_ids))
    batches = session.scalars(query).all()[::-1]
    counts: dict[int, dict[str, int]] = {}
    counted = select(Job.batch_id, Job.state, func.count()).group_by(Job.batch_id, Job.state)
    queries = [counted]
    if batch_ids or limit is not None:
        queries = [counted.where(Job.batch_id.in_(ids)) for ids in in_chunks([batch.id for batch in batches])]
    for batch_id, state, count in (row for query in queries for row in session.execute(query)):
        counts.setdefault(batch_id, {})[state] = count
    now = session.execute(select(db_now())).scalar_one()
    ends = _ends(session, {batch.id: counts.get(batch.id, {}) for batch in batches[-_MOST_ENDS:]})
    return [_batch(batch, counts.get(batch.id, {}), now, ends.get(batch.id)) for batch in batches]


def _ends(session: Session, counts: Mapping[int, Mapping[str, int]]) -> dict[int, datetime]:
    """When the last job of each batch ended that has ended; of a batch with more than ``_LAST_JOBS``, of its last ones.

    All would have to be read, since no index has that time; and nearly always the last ones end last.
    """
    closed = [batch_id for batch_id, states in counts.items() if states and not set(OPEN_STATES) & states.keys()]
    small = [batch_id for batch_id in closed if sum(counts[batch_id].values()) <= _LAST_JOBS]
    ends = _ends_of_small(session, small)
    for batch_id in set(closed) - set(small):
        ends[batch_id] = max((at for state in counts[batch_id] if (at := _end(session, batch_id, state))), default=None)
    return {batch_id: at for batch_id, at in ends.items() if at is not None}


def _ends_of_small(session: Session, batch_ids: Sequence[int]) -> dict[int, datetime | None]:
    """When the last job of each of these small batches ended.

    One statement reads all of their jobs, which takes less time than a statement for each batch.
    """
    if not batch_ids:
        return {}
    last = select(Job.batch_id, func.max(Job.finished_at)).where(Job.batch_id.in_(batch_ids)).group_by(Job.batch_id)
    return {batch_id: at for batch_id, at in session.execute(last)}


def _end(session: Session, batch_id: int, state: str) -> datetime | None:
    last = select(Job.finished_at).where(Job.batch_id == batch_id, Job.state == state)
    last_jobs = last.order_by(Job.id.desc()).limit(_LAST_JOBS).subquery()
    end: datetime | None = session.execute(select(func.max(last_jobs.c.finished_at))).scalar_one()
    return end


def count_batches(session: Session) -> int:
    return session.execute(select(func.count()).select_from(Batch)).scalar_one()


def _batch(batch: Batch, counts: dict[str, int], now: datetime, end: datetime | None) -> dict[str, Any]:
    by_state = {state.value: counts.get(state, 0) for state in JobState}
    return {
        "batch_id": format_batch_id(batch.id),
        "name": batch.name,
        "priority": batch.priority,
        "created_at": batch.created_at.isoformat(),
        "elapsed_s": _seconds(batch.created_at, now if any(counts.get(state) for state in OPEN_STATES) else end),
        "jobs": sum(by_state.values()),
        **by_state,
    }


def list_jobs(
    session: Session, *, batch_ids: Sequence[int] = (), states: Collection[str] = (), limit: int | None = None
) -> list[dict[str, Any]]:
    """Each job with its state, or each of the first ``limit``, in submission order."""
    query = select(*_LISTED, Worker.name.label("worker"), need_source().label("need"), Attempt.claimed_at)
    query = query.outerjoin(Worker, Worker.id == Job.worker_id).order_by(Job.id)
    query = query.outerjoin(Attempt, (Attempt.job_id == Job.id) & (Attempt.attempt == Job.attempt))
    if batch_ids:
        query = query.where(Job.batch_id.in_(batch_ids))
    if states:
        query = query.where(Job.state.in_(states))
    queries = [query]
    if limit is not None:
        first = first_jobs(session, limit, batch_ids=batch_ids, states=states)
        queries = [query.where(Job.id.in_(ids)) for ids in in_chunks(first)]
    now = session.execute(select(db_now())).scalar_one()
    rows = [row for one in queries for row in session.execute(one)]
    waiting = [row.id for row in rows if row.state == JobState.QUEUED and row.search_id is not None]
    awaited = awaited_jobs(session, waiting)
    return [_job(row, now, awaited.get(row.id)) for row in rows]


# Only the columns that are shown: decoding the others would take longer than all the rest.
_LISTED = (
    *(Job.id, Job.batch_id, Job.model, Job.revision, Job.method, Job.bits, Job.device, Job.state, Job.stage),
    Job.recovery,
    *(Job.attempt, Job.failures, Job.progress, Job.error_kind, Job.error_message, Job.above_memory_bytes),
    *(Job.started_at, Job.finished_at, Job.search_id, *MIXTURE_COLUMNS),
)


def _job(row: Any, now: datetime, awaited: int | None) -> dict[str, Any]:
    mixture = mixture_origin(row)
    return {
        "job_id": format_job_id(row.id),
        "batch_id": format_batch_id(row.batch_id),
        "model": row.model,
        "revision": row.revision,
        "scheme": row.method if row.recovery is None else with_adapter_mark(row.method, row.recovery),
        "bits": row.bits,
        "mixture": mixture.to_json() if mixture.is_known else None,
        "state": row.state,
        "stage": row.stage if row.state == JobState.RUNNING else None,
        "attempt": row.attempt,
        "failures": row.failures,
        "worker": row.worker,
        "progress": _progress(row),
        "error_kind": row.error_kind,
        "error_message": row.error_message,
        "above_memory_bytes": row.above_memory_bytes,
        "above_memory_is": row.need,
        "note": _note(row) if awaited is None else f"waits for {format_job_id(awaited)}",
        "started_at": row.started_at.isoformat() if row.started_at else None,
        "finished_at": row.finished_at.isoformat() if row.finished_at else None,
        "elapsed_s": _elapsed_s(row, now),
    }


def _progress(row: Any) -> dict[str, Any] | None:
    """What is measured is over with the job; what it has read and written stays."""
    if row.progress is None or row.state == JobState.RUNNING:
        return row.progress  # type: ignore[no-any-return]
    return {name: value for name, value in row.progress.items() if name != "step"}


def _elapsed_s(row: Any, now: datetime) -> float | None:
    """How long its newest attempt has run, or ran until the job ended; None for a job that waits, or never ran."""
    if row.claimed_at is None or row.state == JobState.QUEUED:
        return None
    return _seconds(row.claimed_at, now if row.state == JobState.RUNNING else row.finished_at)


def _seconds(begin: datetime, end: datetime | None) -> float | None:
    # Never negative, even if the database's clock was set back meanwhile.
    return None if end is None else max(0.0, round((end - begin).total_seconds(), 1))


def _note(row: Any) -> str | None:
    """What a waiting job waits for, where not every device will do."""
    if row.state != JobState.QUEUED or row.above_memory_bytes is None:
        return None
    # A job that is only predicted to be too large for a GPU may also run on a CPU.
    if row.device != DeviceKind.CUDA and row.need != NeedSource.SEEN:
        return None
    return show_need(row.above_memory_bytes)


def list_workers(session: Session, lease_s: float) -> list[dict[str, Any]]:
    """All workers except those that stopped normally, with their jobs.

    ``state`` is ``lost`` if the worker has not renewed its heartbeat for the length of a lease.
    """
    held: dict[int | None, list[str]] = {}
    for job_id, worker_id in session.execute(
        select(Job.id, Job.worker_id).where(Job.state == JobState.RUNNING).order_by(Job.id)
    ):
        held.setdefault(worker_id, []).append(format_job_id(job_id))
    silent = Worker.heartbeat_at <= db_now(-lease_s)
    rows = session.execute(select(Worker, silent).where(Worker.state != WorkerState.STOPPED).order_by(Worker.id))
    return [_worker(worker, bool(lost), held.get(worker.id, [])) for worker, lost in rows]


def _worker(worker: Worker, lost: bool, held: list[str]) -> dict[str, Any]:
    return {
        "worker": worker.name,
        "host": worker.host,
        "pid": worker.pid,
        "device_kind": worker.device_kind,
        "device_name": worker.device_name,
        "device_uuid": worker.device_uuid,
        "memory_bytes": worker.memory_bytes,
        "used_bytes": None if lost else worker.used_bytes,
        "busy_share": None if lost else worker.busy_share,
        "vram_class": vram_class(worker.memory_bytes) if worker.device_kind == DeviceKind.CUDA else None,
        "state": LOST if lost else worker.state,
        "jobs": held,
        "note": worker.note,
        "heartbeat_at": worker.heartbeat_at.isoformat(),
    }


def count_states(session: Session, batch_ids: Collection[int]) -> dict[str, int]:
    """How many jobs of these batches are in each state."""
    rows = session.execute(select(Job.state, func.count()).where(Job.batch_id.in_(batch_ids)).group_by(Job.state))
    return {state: count for state, count in rows}


def live_workers(session: Session, lease_s: float) -> int:
    """How many workers take jobs now."""
    return session.execute(select(func.count()).select_from(Worker).where(is_live(lease_s))).scalar_one()
