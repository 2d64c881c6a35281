"""The results of the first models of many, so that those of the others are not read, or of all, a few at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from qbatch.core.measured.result_row import ResultRow
from qbatch.models_db.job_pages import pages_of_jobs
from qbatch.models_db.model_jobs import jobs_of_models
from qbatch.models_db.result_filter import ResultFilter
from qbatch.models_db.results import find_results
from qbatch.models_db.session import VALUES_AT_ONCE, in_chunks
from qbatch.models_db.tables import Job

_Model = tuple[str, str | None]
"""Its name and its revision."""
_MODELS_AT_ONCE = 100
_NAMES = select(Job.id, Job.batch_id, Job.location, Job.model, Job.revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPage:
    """The rows of some models, in the order of submission, and whether there are more models."""

    rows: Sequence[ResultRow]
    has_more: bool


def results_of_first_models(
    session: Session, most: int | None, *, batch_ids: Sequence[int] = (), only: ResultFilter
) -> ModelPage:
    """All rows of the first ``most`` models that were submitted in these batches; none means all batches."""
    if most is None:
        return ModelPage(rows=find_results(session, batch_ids=batch_ids, only=only), has_more=False)
    places: dict[_Model, set[str]] = {}
    for job in _in_order(session, batch_ids, only):
        model = (job.model, job.revision)
        if model not in places and len(places) == most:
            return ModelPage(rows=_rows(session, places, batch_ids, only), has_more=True)
        places.setdefault(model, set()).add(job.location)
    return ModelPage(rows=_rows(session, places, batch_ids, only), has_more=False)


def results_by_model(session: Session, *, batch_ids: Sequence[int] = ()) -> Iterator[Sequence[ResultRow]]:
    """All rows of these batches, none means all, those of a few models at a time: of many, not all fit in memory."""
    everything = ResultFilter()
    places: dict[_Model, set[str]] = {}
    for job in _in_order(session, batch_ids, everything):
        places.setdefault((job.model, job.revision), set()).add(job.location)
    for some in in_chunks([*places.items()], _MODELS_AT_ONCE):
        yield _rows(session, dict(some), batch_ids, everything)


def _in_order(
    session: Session, batch_ids: Collection[int], only: ResultFilter
) -> Iterator[Row[int, int, str, str, str | None]]:
    for ids in pages_of_jobs(session, VALUES_AT_ONCE, batch_ids=batch_ids, conditions=only.conditions()):
        yield from session.execute(_NAMES.where(Job.id.in_(ids)).order_by(Job.id))


def _rows(
    session: Session, places: dict[_Model, set[str]], batch_ids: Collection[int], only: ResultFilter
) -> list[ResultRow]:
    """The rows of these models, also of jobs that were submitted long after the first of their model.

    They are found by their location, because that has an index, and the name has none.
    """
    jobs = jobs_of_models(
        session,
        _NAMES.where(*only.conditions()),
        locations=set().union(*places.values()),
        batch_ids=batch_ids,
    )
    found = [job.id for job in jobs if (job.model, job.revision) in places]
    return [row for ids in in_chunks(sorted(found)) for row in find_results(session, job_ids=ids)]
