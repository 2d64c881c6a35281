"""Queries for results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from sqlalchemy import ColumnElement, Row, func, select
from sqlalchemy.orm import Session

from qbatch.core.domain import Method, content_hash, format_batch_id, format_job_id, job_number
from qbatch.core.errors import UsageError
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import MEASURED_COLUMNS
from qbatch.core.measured.metrics import ALL_METRICS
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.stored_protocol import StoredProtocol
from qbatch.core.storage import base_path
from qbatch.models_db.checkpoints import gone_among
from qbatch.models_db.job_pages import first_jobs
from qbatch.models_db.mixture_origins import mixture_origin
from qbatch.models_db.model_jobs import jobs_of_families, jobs_of_models
from qbatch.models_db.result_filter import ResultFilter
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import Job, Result

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
_ANY = ResultFilter()
# The titles of a table's columns, as `--columns` takes them too.
_TITLES: dict[str, ColumnElement[Any]] = {
    metric.option_name: _RESULT_COLUMNS[metric.key] for metric in ALL_METRICS if metric.key in _RESULT_COLUMNS
}
SORT_COLUMNS: tuple[str, ...] = (*_TITLES, *(name for name in (*_JOB_COLUMNS, *_RESULT_COLUMNS) if name not in _TITLES))


def find_results(
    session: Session,
    *,
    batch_ids: Sequence[int] = (),
    job_ids: Sequence[int] = (),
    only: ResultFilter = _ANY,
    sort: str | None = None,
    limit: int | None = None,
) -> list[ResultRow]:
    """One row for each job, ended or not, that ``only`` lets through; without the answers to tasks (``with_answers``).

    ``sort`` names a column, ``-column`` sorts downwards, and rows without a value come last; the default is submission
    order. Raises UsageError for a column that does not exist.
    """
    order = _Order.of(sort)
    conditions: list[ColumnElement[bool]] = [Job.id.in_(job_ids)] if job_ids else []
    conditions += only.conditions()
    if limit is not None:
        return _rows_of(session, _first_ids(session, order, batch_ids, conditions, limit, only.is_of_results))
    if batch_ids:
        conditions.append(Job.batch_id.in_(batch_ids))
    return _shown(session, session.execute(_JOBS_WITH_RESULTS.where(*conditions).order_by(*order.terms)).all())


_RESULT_OF_JOB: ColumnElement[bool] = Result.job_id == func.coalesce(Job.reused_from, Job.id)
_JOBS_WITH_RESULTS = select(Job, Result).outerjoin(Result, _RESULT_OF_JOB)


def find_others(session: Session, rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows of the same batches and models that are not among ``rows``: what these are compared with."""
    shown = {job_number(row.job_id) for row in rows}
    families: set[tuple[int, str]] = set()
    for ids in in_chunks(sorted(shown)):
        of_these = select(Job.batch_id, Job.location).where(Job.id.in_(ids))
        families |= {(batch_id, location) for batch_id, location in session.execute(of_these)}
    return _rows_of(session, [job_id for job_id in jobs_of_families(session, families) if job_id not in shown])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """The order of rows: by ``column``, or as submitted."""

    column: ColumnElement[Any] | None = None
    downwards: bool = False

    @classmethod
    def of(cls, sort: str | None) -> Self:
        if sort is None:
            return cls()
        name = sort.removeprefix("-")
        column = (_TITLES | _JOB_COLUMNS | _RESULT_COLUMNS).get(name.casefold())
        if column is None:
            raise UsageError(f"cannot sort by {name!r}; the columns are {', '.join(SORT_COLUMNS)}")
        return cls(column=column, downwards=sort.startswith("-"))

    @property
    def is_of_results(self) -> bool:
        return any(self.column is column for column in _RESULT_COLUMNS.values())

    @property
    def terms(self) -> list[ColumnElement[Any]]:
        if self.column is None:
            return [Job.id.expression]
        # The id as it is would lead SQLite to look up each row by an index that does not help.
        return [(self.column.desc() if self.downwards else self.column.asc()).nulls_last(), Job.id + 0]


def _first_ids(
    session: Session,
    order: _Order,
    batch_ids: Sequence[int],
    conditions: Sequence[ColumnElement[bool]],
    limit: int,
    is_of_results: bool,
) -> list[int]:
    """The ids of the jobs of the first rows. Only ids are sorted, because a row with its details has kilobytes."""
    if order.column is None and not is_of_results:
        return first_jobs(session, limit, batch_ids=batch_ids, conditions=conditions)
    if order.column is not None and order.is_of_results and not batch_ids and not conditions:
        return _first_of_all(session, order.column, order.downwards, limit)
    query = select(Job.id).where(*conditions).order_by(*order.terms).limit(limit)
    if batch_ids:
        query = query.where(Job.batch_id.in_(batch_ids))
    if order.is_of_results or is_of_results:
        query = query.outerjoin(Result, _RESULT_OF_JOB)
    return list(session.scalars(query))


def _first_of_all(session: Session, column: ColumnElement[Any], downwards: bool, limit: int) -> list[int]:
    """The jobs with the first values of a column of the results, by its index; then jobs without a value."""
    best = select(Result.job_id, column).where(column.is_not(None)).limit(limit)
    results = session.execute(best.order_by(column.desc() if downwards else column.asc(), Result.job_id)).all()
    values = {job_id: value for job_id, value in results}
    place = {value: number for number, value in enumerate(dict.fromkeys(values.values()))}
    jobs = [*values.items()]
    for ids in in_chunks([*values]):
        reusing = session.execute(select(Job.id, Job.reused_from).where(Job.reused_from.in_(ids)))
        jobs += ((job_id, values[source]) for job_id, source in reusing)
    first = [job_id for _, job_id in sorted((place[value], job_id) for job_id, value in jobs)][:limit]
    if len(first) == limit:
        return first
    others = select(Job.id).outerjoin(Result, _RESULT_OF_JOB).where(column.is_(None)).order_by(Job.id)
    return [*first, *session.scalars(others.limit(limit - len(first)))]


def _rows_of(session: Session, job_ids: Sequence[int]) -> list[ResultRow]:
    """The rows of these jobs, in that order."""
    found: dict[int, Row[Job, Result | None]] = {}
    for ids in in_chunks(job_ids):
        found |= {row[0].id: row for row in session.execute(_JOBS_WITH_RESULTS.where(Job.id.in_(ids)))}
    return _shown(session, [found[job_id] for job_id in job_ids])


def _shown(session: Session, rows: Sequence[Row[Job, Result | None]]) -> list[ResultRow]:
    baselines = _baselines(session, [job for job, _ in rows])
    found = [_row(job, result, baselines) for job, result in rows]
    paths = {row.checkpoint_path for row in found if row.checkpoint_path is not None}
    bases = {base for path in paths if (base := base_path(path)) is not None}
    gone = gone_among(session, paths | bases)
    return [replace(row, checkpoint_path=None) if _is_gone(row.checkpoint_path, gone) else row for row in found]


def _is_gone(path: str | None, gone: Collection[str]) -> bool:
    """Whether a checkpoint, or the one that an adapter belongs to, is known to be off the storage."""
    return path is not None and (path in gone or base_path(path) in gone)


def _baselines(session: Session, jobs: Sequence[Job]) -> dict[tuple[Any, ...], int]:
    """The baseline job of each (batch, source, dtype, requested protocol) among ``jobs``."""
    columns = (Job.id, Job.batch_id, Job.location, Job.revision, Job.dtype, Job.protocol)
    query = select(*columns).where(Job.method == Method.NONE).order_by(Job.id)
    locations, batch_ids = {job.location for job in jobs}, {job.batch_id for job in jobs}
    found = jobs_of_models(session, query, locations=locations, batch_ids=batch_ids) if jobs else ()
    # Of two of a family, the later one counts, whatever the order is in which they are read.
    return {_family(job): job.id for job in sorted(found, key=lambda job: job.id)}


def _family(job: Any) -> tuple[Any, ...]:
    return (job.batch_id, job.location, job.revision, job.dtype, content_hash(job.protocol))


def _row(job: Job, result: Result | None, baselines: Mapping[tuple[Any, ...], int]) -> ResultRow:
    baseline = baselines.get(_family(job))
    scheme: Mapping[str, Any] = job.scheme
    measured: dict[str, Any] = {} if result is None else {name: getattr(result, name) for name in MEASURED_COLUMNS}
    # Until it is measured, a row says what was asked for.
    asked = {"dtype": job.dtype, "compute_dtype": scheme["compute_dtype"]}
    return ResultRow(
        batch_id=format_batch_id(job.batch_id),
        job_id=format_job_id(job.id),
        model=job.model,
        revision=job.revision,
        state=job.state,
        error_kind=job.error_kind,
        error_message=job.error_message,
        reused_from=format_job_id(job.reused_from) if job.reused_from is not None else None,
        was_begun=job.attempt > 0,
        scheme=job.method,
        bits=job.bits,
        double_quant=scheme.get("double_quant", False),
        options={name: value for name, value in scheme.items() if name != "method"},
        mixture=mixture_origin(job),
        checkpoint_path=result.checkpoint_path if result else None,
        **(asked | measured),
        baseline_job_id=format_job_id(baseline) if baseline is not None and baseline != job.id else None,
        protocol=StoredProtocol.from_json(result.protocol if result else None),
        protocol_hash=result.protocol_hash if result else None,
        details=Details.from_json(result.details if result else None),
    )
