"""The jobs of some models in some batches, by whichever index has fewer of them to read.

No index of all jobs has both. A model may have been submitted every night for years, and a batch may have tens of
thousands of jobs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from qbatch.models_db.session import VALUES_AT_ONCE, in_chunks
from qbatch.models_db.tables import Job

# For each model. In longer batches, nobody counts whether its history is longer still.
_MOST_JOBS_OF_BATCH = 100


def jobs_of_models(
    session: Session, query: Select[*tuple[Any, ...]], *, locations: Collection[str], batch_ids: Collection[int]
) -> Iterator[Any]:
    """The rows of ``query`` for jobs of models at these locations in these batches; none means all batches.

    ``query`` selects jobs, their ``batch_id`` and their ``location`` among other columns.
    """
    places, batches = set(locations), set(batch_ids)
    if batches and (len(places) > VALUES_AT_ONCE or _have_fewer_jobs(session, batches, places)):
        for some in in_chunks(sorted(batches)):
            yield from (row for row in session.execute(query.where(Job.batch_id.in_(some))) if row.location in places)
        return
    for locations_ in in_chunks(sorted(places)):
        rows = session.execute(query.where(Job.location.in_(locations_)))
        yield from (row for row in rows if not batches or row.batch_id in batches)


def jobs_of_families(session: Session, families: Collection[tuple[int, str]]) -> list[int]:
    """The ids of the jobs of each (batch, location of a model), in ascending order."""
    jobs = jobs_of_models(
        session,
        select(Job.id, Job.batch_id, Job.location),
        locations={location for _, location in families},
        batch_ids={batch_id for batch_id, _ in families},
    )
    return sorted(job.id for job in jobs if (job.batch_id, job.location) in families)


def _have_fewer_jobs(session: Session, batch_ids: Collection[int], locations: Collection[str]) -> bool:
    """Whether these batches have fewer jobs than were ever submitted of models at these locations."""
    most = _MOST_JOBS_OF_BATCH * len(locations)
    if len(batch_ids) > VALUES_AT_ONCE or (of_batches := _count(session, Job.batch_id.in_(batch_ids), most)) == most:
        return False
    return of_batches < _count(session, Job.location.in_(locations), of_batches + 1)


def _count(session: Session, which: ColumnElement[bool], most: int) -> int:
    """How many jobs there are, of which no more than ``most`` are counted."""
    first = select(Job.id).where(which).limit(most).subquery()
    return session.execute(select(func.count()).select_from(first)).scalar_one()
