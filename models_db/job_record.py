"""Everything recorded about a job besides its result: what was requested, its attempts, its checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from qbatch.core.domain import format_batch_id, format_job_id, job_number
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.search.finished_search import FinishedSearch
from qbatch.core.stored_json import Stored, omitted_if_unknown
from qbatch.models_db.memory_need import need_source
from qbatch.models_db.results import find_results
from qbatch.models_db.searches import find_searches
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import Attempt, Checkpoint, Job, Result, Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord(Stored):
    """One claim, and how it ended."""

    attempt: int
    worker: str
    outcome: str | None = None
    message: str | None = None
    claimed_at: str
    ended_at: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord(Stored):
    """``written_by``: None where that job was pruned. ``gone_at``: since when it is known to be off the storage."""

    root_sha256: str
    disk_bytes: int | None = None
    written_by: str | None = None
    created_at: str | None = None
    gone_at: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord(Stored):
    """``attempts`` has every claim, the first one first. ``checkpoint`` is that of the job's key: None for a baseline,
    and until it is published. ``log_path`` is the log of the newest attempt, as this machine sees it, if whoever asked
    knows the storage. Times are aware, in ISO 8601."""

    job_id: str
    batch_id: str
    bundle: str | None = None
    location: str
    is_folder: bool | None = None
    device: str | None = None
    asked_protocol: Mapping[str, Any] | None = None
    force: bool | None = None
    allow_pickle: bool
    priority: int
    time_limit_s: float | None = None
    above_memory_bytes: int | None = None
    above_memory_is: str | None = None
    stage: str | None = None
    attempt: int
    failures: int
    progress: Mapping[str, Any] | None = None
    worker: str | None = None
    queue: str | None = None
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    lease_expires_at: str | None = None
    not_before: str | None = None
    checkpoint_key: str | None = None
    base_key: str | None = omitted_if_unknown()
    checkpoint: CheckpointRecord | None = None
    attempts: tuple[AttemptRecord, ...]
    log_path: str | None = None
    measured_at: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeJob:
    """All about a job: its row of results, its record, and its baseline's row where there is one.

    ``search``: what it found, if it is a search. ``points``: the jobs that publish its mixtures, by their points.
    """

    row: ResultRow
    record: JobRecord
    baseline: ResultRow | None
    search: FinishedSearch | None = None
    points: Mapping[int, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        found = {} if self.search is None else {"search": self.search.to_json(), "points": dict(self.points)}
        return self.row.to_json() | self.record.to_json() | found


def whole_jobs(session: Session, job_ids: Sequence[int]) -> list[WholeJob]:
    """All about those jobs among ``job_ids`` that exist, in that order."""
    return [job for chunk in in_chunks(job_ids) for job in _whole(session, chunk)]


def _whole(session: Session, job_ids: Sequence[int]) -> list[WholeJob]:
    rows = {row.job_id: row for row in find_results(session, job_ids=job_ids)}
    wanted = sorted({row.baseline_job_id for row in rows.values() if row.baseline_job_id is not None})
    found = find_results(session, job_ids=[job_number(text) for text in wanted]) if wanted else []
    baselines = {row.job_id: row for row in found}
    searched = _searched(session, job_ids)
    points = _points(session, searched)
    return [
        WholeJob(
            row=rows[record.job_id],
            record=record,
            baseline=baselines.get(rows[record.job_id].baseline_job_id or ""),
            search=searched.get(job_number(record.job_id)),
            points=points.get(job_number(record.job_id), {}),
        )
        for record in job_records(session, job_ids)
    ]


def _searched(session: Session, job_ids: Sequence[int]) -> dict[int, FinishedSearch]:
    """What those of these jobs found that are searches, by job."""
    query = select(Job.id, Job.search_id).where(Job.id.in_(job_ids), Job.search_id.is_not(None))
    ids = {job_id: search_id for job_id, search_id in session.execute(query)}
    found = find_searches(session, {search_id for search_id in ids.values() if search_id is not None})
    return {job_id: found[search_id] for job_id, search_id in ids.items() if search_id in found}


def _points(session: Session, searches: Collection[int]) -> dict[int, dict[int, str]]:
    """The jobs that publish the mixtures of these searches, by search and point."""
    query = select(Job.search_job_id, Job.point, Job.id).where(Job.search_job_id.in_(searches))
    found: dict[int, dict[int, str]] = {}
    for search, point, job_id in session.execute(query) if searches else ():
        if search is not None and point is not None:
            found.setdefault(search, {})[point] = format_job_id(job_id)
    return found


def job_records(session: Session, job_ids: Sequence[int]) -> list[JobRecord]:
    """The records of those jobs among ``job_ids`` that exist, in that order."""
    rows = session.execute(
        select(Job, Worker.name, need_source(), Checkpoint, Result.created_at)
        .outerjoin(Worker, Worker.id == Job.worker_id)
        .outerjoin(Checkpoint, Checkpoint.key == Job.checkpoint_key)
        .outerjoin(Result, Result.job_id == func.coalesce(Job.reused_from, Job.id))
        .where(Job.id.in_(job_ids))
    )
    attempts = _attempts(session, job_ids)
    records = {
        job.id: _record(job, worker, need, checkpoint, tuple(attempts.get(job.id, ())), measured_at)
        for job, worker, need, checkpoint, measured_at in rows
    }
    return [records[job_id] for job_id in job_ids if job_id in records]


def _attempts(session: Session, job_ids: Sequence[int]) -> dict[int, list[AttemptRecord]]:
    found: dict[int, list[AttemptRecord]] = {}
    rows = session.execute(
        select(Attempt, Worker.name)
        .join(Worker, Worker.id == Attempt.worker_id)
        .where(Attempt.job_id.in_(job_ids))
        .order_by(Attempt.job_id, Attempt.attempt)
    )
    for attempt, worker in rows:
        found.setdefault(attempt.job_id, []).append(
            AttemptRecord(
                attempt=attempt.attempt,
                worker=worker,
                outcome=attempt.outcome,
                message=attempt.message,
                claimed_at=attempt.claimed_at.isoformat(),
                ended_at=_iso(attempt.ended_at),
                seconds=(attempt.ended_at - attempt.claimed_at).total_seconds() if attempt.ended_at else None,
            )
        )
    return found


def _record(
    job: Job,
    worker: str | None,
    need: str | None,
    checkpoint: Checkpoint | None,
    attempts: tuple[AttemptRecord, ...],
    measured_at: datetime | None,
) -> JobRecord:
    return JobRecord(
        job_id=format_job_id(job.id),
        batch_id=format_batch_id(job.batch_id),
        bundle=job.bundle,
        location=job.location,
        is_folder=job.is_folder,
        device=job.device,
        asked_protocol=job.protocol,
        force=job.force,
        allow_pickle=job.allow_pickle,
        priority=job.priority,
        time_limit_s=job.time_limit_s,
        above_memory_bytes=job.above_memory_bytes,
        above_memory_is=need,
        stage=job.stage,
        attempt=job.attempt,
        failures=job.failures,
        progress=job.progress,
        worker=worker,
        queue=job.queue,
        created_at=_iso(job.created_at),
        started_at=_iso(job.started_at),
        finished_at=_iso(job.finished_at),
        lease_expires_at=_iso(job.lease_expires_at),
        not_before=_iso(job.not_before),
        checkpoint_key=job.checkpoint_key,
        base_key=job.base_key,
        checkpoint=None if checkpoint is None else _checkpoint(checkpoint),
        attempts=attempts,
        measured_at=_iso(measured_at),
    )


def _checkpoint(checkpoint: Checkpoint) -> CheckpointRecord:
    return CheckpointRecord(
        root_sha256=checkpoint.root_sha256,
        disk_bytes=checkpoint.disk_bytes,
        written_by=format_job_id(checkpoint.job_id) if checkpoint.job_id is not None else None,
        created_at=checkpoint.created_at.isoformat(),
        gone_at=_iso(checkpoint.gone_at),
    )


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
