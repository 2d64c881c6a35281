"""Everything recorded about a job besides its result: what was requested, its attempts, its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from qbatch.core.domain import format_batch_id, format_job_id, parse_id
from qbatch.models_db.results import find_results
from qbatch.models_db.tables import Attempt, Checkpoint, Job, Result, Worker

Row = dict[str, Any]

_TIMES = ("created_at", "started_at", "finished_at", "lease_expires_at", "not_before")


def whole_jobs(session: Session, job_ids: Sequence[int]) -> list[tuple[Row, Row | None]]:
    """For each existing job, in the order of ``job_ids``: its row of ``find_results`` merged with its record, and the
    row of its baseline or None."""
    if not job_ids:
        return []
    rows = {row["job_id"]: row for row in find_results(session, job_ids=job_ids)}
    baseline_ids = {row["baseline_job_id"] for row in rows.values()} - {None}
    baselines = {}
    if baseline_ids:
        found = find_results(session, job_ids=[parse_id(text)[1] for text in sorted(baseline_ids)])
        baselines = {row["job_id"]: row for row in found}
    return [
        (rows[record["job_id"]] | record, baselines.get(rows[record["job_id"]]["baseline_job_id"]))
        for record in job_records(session, job_ids)
    ]


def job_records(session: Session, job_ids: Sequence[int]) -> list[Row]:
    """One mapping for each existing job, in the order of ``job_ids``. Times are in ISO 8601, with a time zone.

    ``attempts`` has every claim, the first one first. ``checkpoint`` is that of the job's key: None for a baseline,
    and until it is published.
    """
    rows = session.execute(
        select(Job, Worker.name, Checkpoint, Result.created_at)
        .outerjoin(Worker, Worker.id == Job.worker_id)
        .outerjoin(Checkpoint, Checkpoint.key == Job.checkpoint_key)
        .outerjoin(Result, Result.job_id == func.coalesce(Job.reused_from, Job.id))
        .where(Job.id.in_(job_ids))
    )
    attempts = _attempts(session, job_ids)
    records = {
        job.id: _record(job, worker, checkpoint, attempts.get(job.id, []))
        | {"measured_at": None if measured_at is None else measured_at.isoformat()}
        for job, worker, checkpoint, measured_at in rows
    }
    return [records[job_id] for job_id in job_ids if job_id in records]


def _attempts(session: Session, job_ids: Sequence[int]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    rows = session.execute(
        select(Attempt, Worker.name)
        .join(Worker, Worker.id == Attempt.worker_id)
        .where(Attempt.job_id.in_(job_ids))
        .order_by(Attempt.job_id, Attempt.attempt)
    )
    for attempt, worker in rows:
        found.setdefault(attempt.job_id, []).append(
            {
                "attempt": attempt.attempt,
                "worker": worker,
                "outcome": attempt.outcome,
                "message": attempt.message,
                "claimed_at": attempt.claimed_at.isoformat(),
                "ended_at": attempt.ended_at.isoformat() if attempt.ended_at else None,
                "seconds": (attempt.ended_at - attempt.claimed_at).total_seconds() if attempt.ended_at else None,
            }
        )
    return found


def _record(job: Job, worker: str | None, checkpoint: Checkpoint | None, attempts: list[Row]) -> Row:
    times = {name: getattr(job, name) for name in _TIMES}
    return {
        "job_id": format_job_id(job.id),
        "batch_id": format_batch_id(job.batch_id),
        "bundle": job.bundle,
        "location": job.location,
        "is_folder": job.is_folder,
        "device": job.device,
        "asked_protocol": job.protocol,
        "force": job.force,
        "allow_pickle": job.allow_pickle,
        "priority": job.priority,
        "time_limit_s": job.time_limit_s,
        "above_memory_bytes": job.above_memory_bytes,
        "stage": job.stage,
        "attempt": job.attempt,
        "failures": job.failures,
        "progress": job.progress,
        "worker": worker,
        "queue": job.queue,
        **{name: value.isoformat() if value is not None else None for name, value in times.items()},
        "checkpoint_key": job.checkpoint_key,
        "checkpoint": None if checkpoint is None else _checkpoint(checkpoint),
        "attempts": attempts,
    }


def _checkpoint(checkpoint: Checkpoint) -> Row:
    return {
        "root_sha256": checkpoint.root_sha256,
        "disk_bytes": checkpoint.disk_bytes,
        "written_by": format_job_id(checkpoint.job_id) if checkpoint.job_id is not None else None,
        "created_at": checkpoint.created_at.isoformat(),
    }
