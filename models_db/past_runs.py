"""Reads how long jobs took that have ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState, Method
from qbatch.core.job_duration import JobWork, PastRun, share_of_bundle
from qbatch.core.kinds import DeviceKind
from qbatch.core.measured.stored_protocol import StoredProtocol
from qbatch.core.recovery import Recovery
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import Attempt, Job, Result, SearchRow, Worker

# Enough for several sizes of models and all methods.
_NEWEST = 500
# PostgreSQL finds so few by an index, even in a short history.
_AT_ONCE = 40


_ENDED = (
    select(
        *(Result.job_id, Result.num_parameters, Result.protocol, Result.protocol_hash, Result.prefill_s_p50),
        *(Job.method, Job.scheme, Job.location, Job.bundle, Attempt.worker_id, Attempt.claimed_at, Attempt.ended_at),
        Worker.device_kind,
    )
    .join(Job, Job.id == Result.job_id)
    .join(Attempt, (Attempt.job_id == Result.job_id) & (Attempt.attempt == Result.attempt))
    .join(Worker, Worker.id == Attempt.worker_id)
)


def past_runs(session: Session, *, newest: int = _NEWEST) -> list[PastRun]:
    """The newest jobs with results of their own, the last one first, for ``estimate_duration``."""
    # The condition holds for every row. With it SQLite begins at the end of the index.
    ids = session.scalars(
        select(Result.job_id).where(Result.job_id > 0).order_by(Result.job_id.desc()).limit(newest)
    ).all()
    rows = [row for some in in_chunks(ids, _AT_ONCE) for row in session.execute(_ENDED.where(Result.job_id.in_(some)))]
    rows.sort(key=lambda row: -row.job_id)
    bundles: dict[tuple[str, int], list[Row[Any]]] = {}
    for row in rows:
        bundles.setdefault((row.bundle, row.worker_id), []).append(row)
    groups = list(bundles.values())
    # Only a part of the oldest bundle was read, so its time would be shared among too few jobs.
    whole = groups[:-1] if len(ids) == newest and len(groups) > 1 else groups
    running = running_bundles(session)
    measured = [run for group in whole if group[0].bundle not in running for run in _runs(group)]
    return [*measured, *_searches(session)]


def _searches(session: Session) -> list[PastRun]:
    """The newest ones, if their jobs are still there."""
    query = (
        select(SearchRow.parameters, SearchRow.seconds, Job.method, Job.location, Worker.device_kind)
        # Outer, so that no planner begins with the jobs, of which there are far more.
        .outerjoin(Job, Job.id == SearchRow.job_id)
        .outerjoin(Worker, Worker.id == Job.worker_id)
        .order_by(SearchRow.id.desc())
        .limit(_AT_ONCE)
    )
    return [
        PastRun(
            work=JobWork.of_search(row.method, DeviceKind(row.device_kind), row.location, row.parameters),
            seconds=row.seconds,
        )
        for row in session.execute(query)
        if row.device_kind is not None
    ]


def running_bundles(session: Session) -> set[str]:
    """The bundles that workers hold now. Until such a one has ended, its time would be shared among too few jobs."""
    return set(session.scalars(select(Job.bundle).where(Job.state == JobState.RUNNING)))


def _runs(bundle: Sequence[Row[Any]]) -> list[PastRun]:
    """The jobs of one bundle on one worker."""
    ended = [row for row in bundle if row.ended_at is not None]
    if not ended:
        return []
    held = [(row.claimed_at.timestamp(), row.ended_at.timestamp()) for row in ended]
    seconds = share_of_bundle(held, len(ended))
    return [PastRun(work=_work(row), seconds=seconds, token_s=_token_s(row)) for row in ended]


def _token_s(row: Row[Any]) -> float | None:
    protocol = StoredProtocol.from_json(row.protocol)
    tokens = (protocol.batch_size or 1) * (protocol.prompt_tokens or 0)
    return row.prefill_s_p50 / tokens if row.method == Method.NONE and row.prefill_s_p50 and tokens else None


def _work(row: Row[Any]) -> JobWork:
    recovery = Recovery.find(row.scheme.get("recovery") or {})
    return JobWork(
        method=row.method,
        device_kind=DeviceKind(row.device_kind),
        protocol_hash=row.protocol_hash,
        parts=StoredProtocol.from_json(row.protocol).parts,
        has_tasks=bool(row.protocol.get("tasks")),
        location=row.location,
        parameters=row.num_parameters,
        recovery=None if recovery is None else recovery.kind,
        steps=None if recovery is None else recovery.steps,
    )
