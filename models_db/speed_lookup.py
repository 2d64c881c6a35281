"""Find what was timed already for models of the same shape, in the same batch, on the same GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from qbatch.core.domain import Method, format_job_id
from qbatch.core.measured.details import Details
from qbatch.core.measured.known_speed import KnownSpeed
from qbatch.core.measured.measurement import MEASURED_COLUMNS, Figures
from qbatch.models_db.tables import Job, Result

# Enough for the schemes of several models; one is needed.
_MOST_ROWS = 256

_Timed = Mapping[int, KnownSpeed]


def find_known_speeds(session: Session, keys: Mapping[int, str]) -> dict[int, KnownSpeed]:
    """The speed of each job of one model, by its ``Details.speed_key``, as far as it was measured in its batch.

    All jobs with one key get the rows of one model that were timed in the same rounds, the baseline's among them, or
    none: rows of different rounds cannot be compared as closely.
    """
    jobs = session.scalars(select(Job).where(Job.id.in_(keys))).all()
    found: dict[int, KnownSpeed] = {}
    for key in set(keys.values()):
        wanted = [job for job in jobs if keys[job.id] == key]
        if any(job.method == Method.NONE for job in wanted):
            found |= _whole_set(session, wanted, key)
    return found


def _whole_set(session: Session, wanted: Sequence[Job], key: str) -> dict[int, KnownSpeed]:
    rows = session.execute(
        select(Job.id, Job.scheme, Result)
        .join(Result, Result.job_id == Job.id)
        .where(Result.speed_key == key, Job.batch_id == wanted[0].batch_id)
        .order_by(Job.id)
        .limit(_MOST_ROWS)
    ).all()
    by_model: dict[str | None, list[Row[Any]]] = {}
    for row in rows:
        by_model.setdefault(row.Result.details.get("fingerprint"), []).append(row)
    for members in by_model.values():
        chosen = {job.id: row for job in wanted for row in members if row.scheme == job.scheme}
        known = {job_id: _known(row) for job_id, row in chosen.items()}
        if len(known) == len(wanted) and _in_the_same_rounds(known.values()):
            return known
    return {}


def _known(row: Row[Any]) -> KnownSpeed:
    columns = {name: getattr(row.Result, name) for name in MEASURED_COLUMNS}
    figures = Figures(**columns, details=Details.from_json(row.Result.details))
    return KnownSpeed(job_id=format_job_id(row.id), figures=figures)


def _in_the_same_rounds(known: Iterable[KnownSpeed]) -> bool:
    together = list(known)
    return all(
        other is one or other.job_id in (one.figures.details.rounds.interleaved_with or ())
        for one in together
        for other in together
    )
