"""What was measured, and the questions asked of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from models_db.domain import MEASURED_COLUMNS, JobState, content_hash, format_batch_id, format_job_id
from models_db.errors import UsageError
from models_db.tables import Job, Result

_JOB_COLUMNS: dict[str, ColumnElement[Any]] = {
    "batch_id": Job.batch_id.expression,
    "job_id": Job.id.expression,
    "model": Job.model.expression,
    "revision": Job.revision.expression,
    "state": Job.state.expression,
    "error_kind": Job.error_kind.expression,
    "error_message": Job.error_message.expression,
    "reused_from": Job.reused_from.expression,
    "scheme": Job.method.expression,
    "bits": Job.bits.expression,
}
_RESULT_COLUMNS: dict[str, ColumnElement[Any]] = {
    "checkpoint_path": Result.checkpoint_path.expression,
    **{name: getattr(Result, name).expression for name in MEASURED_COLUMNS},
    "protocol_hash": Result.protocol_hash.expression,
}
SORT_COLUMNS: tuple[str, ...] = (*_JOB_COLUMNS, *_RESULT_COLUMNS)


def find_results(
    session: Session,
    *,
    batch_ids: Sequence[int] = (),
    job_ids: Sequence[int] = (),
    model: str | None = None,
    bits: Collection[int] = (),
    sort: str | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """One mapping for each job, ended or not; what was not measured is None.

    ``options`` are the scheme's, as asked for; ``protocol`` is the one it was measured by. ``model`` matches a part of
    the name. ``sort`` names a column, ``-column`` sorts downwards, and rows without a value come last; the default is
    submission order. Raises UsageError for a column that does not exist.
    """
    query = (
        select(Job, Result)
        .outerjoin(Result, Result.job_id == func.coalesce(Job.reused_from, Job.id))
        .order_by(*_order(sort), Job.id)
        .limit(limit)
    )
    if batch_ids:
        query = query.where(Job.batch_id.in_(batch_ids))
    if job_ids:
        query = query.where(Job.id.in_(job_ids))
    if model is not None:
        query = query.where(Job.model.contains(model, autoescape=True))
    if bits:
        query = query.where(Job.bits.in_(bits))
    rows = session.execute(query).all()
    baselines = _baselines(session, {job.batch_id for job, _ in rows})
    return [_as_mapping(job, result, baselines) for job, result in rows]


def _order(sort: str | None) -> list[ColumnElement[Any]]:
    if sort is None:
        return []
    name = sort.removeprefix("-")
    column = (_JOB_COLUMNS | _RESULT_COLUMNS).get(name)
    if column is None:
        raise UsageError(f"cannot sort by {name!r}; the columns are {', '.join(SORT_COLUMNS)}")
    return [(column.desc() if sort.startswith("-") else column.asc()).nulls_last()]


def _baselines(session: Session, batch_ids: Collection[int]) -> dict[tuple[Any, ...], int]:
    """The baseline job of each (batch, source, protocol as asked)."""
    jobs = session.scalars(select(Job).where(Job.batch_id.in_(batch_ids), Job.method == "none").order_by(Job.id))
    return {_family(job): job.id for job in jobs}


def _family(job: Job) -> tuple[Any, ...]:
    return (job.batch_id, job.location, job.revision, job.dtype, content_hash(job.protocol))


def _as_mapping(job: Job, result: Result | None, baselines: Mapping[tuple[Any, ...], int]) -> dict[str, Any]:
    baseline = baselines.get(_family(job))
    scheme: Mapping[str, Any] = job.scheme
    row: dict[str, Any] = {
        "batch_id": format_batch_id(job.batch_id),
        "job_id": format_job_id(job.id),
        "model": job.model,
        "revision": job.revision,
        "state": job.state,
        "error_kind": job.error_kind,
        "error_message": job.error_message,
        "reused_from": format_job_id(job.reused_from) if job.reused_from is not None else None,
        "scheme": job.method,
        "bits": job.bits,
        "double_quant": scheme["double_quant"],
        "options": {name: value for name, value in scheme.items() if name != "method"},
        "checkpoint_path": result.checkpoint_path if result else None,
    }
    row |= {name: getattr(result, name) if result else None for name in MEASURED_COLUMNS}
    # Until it is measured, a row says what was asked for.
    row["dtype"] = result.dtype if result else job.dtype
    row["compute_dtype"] = result.compute_dtype if result else scheme["compute_dtype"]
    row["baseline_job_id"] = format_job_id(baseline) if baseline is not None and baseline != job.id else None
    row["protocol"] = result.protocol if result else None
    row["protocol_hash"] = result.protocol_hash if result else None
    row["details"] = result.details if result else None
    return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A job that has a result of its own. ``checkpoint_path`` is relative to the storage; a baseline has none."""

    job_id: int
    checkpoint_path: str | None


def find_finished(
    session: Session, *, checkpoint_key: str, protocol_hash: str, device_names: Collection[str] | None
) -> Finished | None:
    """The newest job whose own result answers this (checkpoint, protocol); None where there is none.

    ``device_names`` None accepts any device: speed is only the same on a device of the same name.
    """
    query = (
        select(Job.id, Result.checkpoint_path)
        .join(Result, Result.job_id == Job.id)
        .where(
            Job.checkpoint_key == checkpoint_key,
            Job.state == JobState.SUCCEEDED,
            Result.protocol_hash == protocol_hash,
        )
        .order_by(Job.id.desc())
        .limit(1)
        .with_for_update(read=True, key_share=True, of=Job)
    )
    if device_names is not None:
        query = query.where(Result.device_name.in_(device_names))
    # Whoever answers with it refers to it: until then it must not be pruned.
    row = session.execute(query).first()
    return Finished(job_id=row.id, checkpoint_path=row.checkpoint_path) if row is not None else None
