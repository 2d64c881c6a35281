"""The leases of running jobs, and their progress."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState, Method, Stage, Token
from qbatch.core.retry_policy import WAITS_FOR_ROOM
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.few_jobs import WAITS_AGAIN
from qbatch.models_db.jobs.transitions import lock
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Job


def heartbeat(session: Session, tokens: Iterable[Token], lease_s: float) -> frozenset[int]:
    """Renew the leases of ``tokens``. Returns the ids of the jobs that are still held; the others were lost."""
    held = lock(session, _holds(tokens))
    session.execute(
        update(Job).where(Job.id.in_(held)).values(lease_expires_at=db_now(lease_s)), execution_options=NO_SYNC
    )
    return frozenset(held)


def held(session: Session, tokens: Iterable[Token]) -> frozenset[int]:
    """The ids of the jobs that ``tokens`` still hold. A cheap check between heartbeats."""
    return frozenset(session.scalars(select(Job.id).where(_holds(tokens))))


def _holds(tokens: Iterable[Token]) -> ColumnElement[bool]:
    each = [and_(Job.id == job_id, Job.attempt == attempt) for job_id, attempt in tokens]
    return and_(Job.state == JobState.RUNNING, or_(*each)) if each else Job.id.is_(None)


def note(
    session: Session,
    token: Token,
    *,
    stage: Stage | None = None,
    work_started: bool | None = None,
    progress: Mapping[str, Any] | None = None,
    checkpoint_key: str | None = None,
    base_key: str | None = None,
) -> None:
    """Record the progress of a running attempt. Has no effect if the attempt no longer holds the job."""
    values: dict[str, Any] = {}
    if stage is not None:
        values["stage"] = stage
    if work_started is not None:
        values["work_started"] = work_started
    if progress is not None:
        values["progress"] = dict(progress)
    if checkpoint_key is not None:
        values["checkpoint_key"] = checkpoint_key
    if base_key is not None:
        values["base_key"] = base_key
    session.execute(update(Job).where(_holds([token])).values(**values), execution_options=NO_SYNC)


def any_waits_for_space(session: Session) -> bool:
    """Whether a queued job waits until the storage has space."""
    # A job that found its source cache full has a time to wait for, and is excluded.
    waits = and_(WAITS_AGAIN, Job.error_kind.in_(WAITS_FOR_ROOM), Job.not_before.is_(None))
    return session.scalars(select(Job.id).where(waits).limit(1)).first() is not None


def keys_being_written(session: Session, keys: Collection[str], *, but_by: Collection[int]) -> set[str]:
    """The checkpoint keys, among ``keys``, that running jobs other than ``but_by`` (job ids) need."""
    wanted = select(Job.checkpoint_key).where(
        Job.checkpoint_key.in_(keys),
        Job.state == JobState.RUNNING,
        Job.method != Method.NONE,
        Job.id.not_in(but_by),
    )
    return {key for key in session.scalars(wanted) if key is not None}
