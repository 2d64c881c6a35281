"""Which checkpoints jobs that have not ended need, or may turn out to need."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, and_, or_, select
from sqlalchemy.orm import Session

from qbatch.core.domain import OPEN_STATES, JobState, Method, format_job_id
from qbatch.core.retry_policy import MAY_STILL_SUCCEED
from qbatch.core.storage import NAMELESS
from qbatch.models_db.arrival_filter import ALSO_ARRIVING
from qbatch.models_db.few_jobs import HAS_BASE
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import Job

# Queued, running, or failed only because an outcome is unknown that a spool may still hold.
_UNDECIDED: ColumnElement[bool] = or_(
    Job.state.in_(OPEN_STATES), and_(Job.state == JobState.FAILED, Job.error_kind.in_(sorted(MAY_STILL_SUCCEED)))
)


def why_needed(
    session: Session, key: str, *, name: str, method: str | None, but_for: Collection[int] = ()
) -> str | None:
    """Which job needs the checkpoint with this key, in words; None if there is none.

    ``but_for``: failed jobs to ignore.

    A job has no key until a worker has read its source. Such a job may need any checkpoint of its method (any at all if
    ``method`` is None) in the folder ``name`` of its model.
    """
    named = and_(Job.checkpoint_key == key, _UNDECIDED)
    based = and_(Job.base_key == key, HAS_BASE, _UNDECIDED)
    unknown = and_(Job.checkpoint_key.is_(None), Job.state.in_(OPEN_STATES), Job.model.like(_pattern(name)))
    may_be = unknown if method is None else and_(unknown, Job.method == method)
    for condition in (named, based, may_be):
        query = select(Job.id, Job.state).where(condition, Job.method != Method.NONE).order_by(Job.id)
        for job_id, state in session.execute(query, execution_options=ALSO_ARRIVING):
            if job_id not in but_for or state in OPEN_STATES:
                return _need(job_id, state, is_certain=condition is not may_be)
    return None


def _pattern(name: str) -> str:
    """What every model matches whose folder has this name: characters other than ASCII letters and digits became
    dashes, and a name without any became ``NAMELESS``."""
    return "%" if name == NAMELESS else f"%{name.replace('-', '%')}%"


def _need(job_id: int, state: str, *, is_certain: bool) -> str:
    if state == JobState.FAILED:
        return f"a worker may still hold the outcome of {format_job_id(job_id)}, which was lost"
    return f"{format_job_id(job_id)} is {state} and {'needs' if is_certain else 'may need'} it"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointUser:
    """A job with the checkpoint that it needs or needed."""

    job_id: int
    batch_id: int
    model: str
    method: str


def users_of(session: Session, keys: Collection[str] | None = None) -> Mapping[str, list[CheckpointUser]]:
    """The quantized jobs with these checkpoint keys, ended or not, by key; of all keys if none are given. A job with
    an adapter has the checkpoint that it belongs to, too."""
    found: dict[str, list[CheckpointUser]] = {}
    for query in _users(keys):
        for key, job_id, batch_id, model, method in session.execute(query, execution_options=ALSO_ARRIVING):
            user = CheckpointUser(job_id=job_id, batch_id=batch_id, model=model, method=method)
            found.setdefault(str(key), []).append(user)
    for users in found.values():
        users.sort(key=lambda user: user.job_id)
    return found


def _users(keys: Collection[str] | None) -> Iterator[Select[str | None, int, int, str, str]]:
    for column, condition in ((Job.checkpoint_key, Job.checkpoint_key.is_not(None)), (Job.base_key, HAS_BASE)):
        columns = select(column, Job.id, Job.batch_id, Job.model, Job.method)
        query = columns.where(condition, Job.method != Method.NONE).order_by(Job.id)
        if keys is None:
            yield query
        else:
            yield from (query.where(column.in_(part)) for part in in_chunks([*keys]))
