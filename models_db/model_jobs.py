"""The jobs of some models in some batches, by whichever index has fewer of them to read.

No index has both. A model may have been submitted every night for years, and a batch may have tens of thousands of
jobs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from qbatch.models_db.session import VALUES_AT_ONCE, in_chunks
from qbatch.models_db.tables import Job

# A batch with no more jobs than so many for each model is read as a whole.
_JOBS_PER_MODEL = 100


def jobs_of_models(
    session: Session, query: Select[*tuple[Any, ...]], *, locations: Collection[str], batch_ids: Collection[int]
) -> Iterator[Any]:
    """The rows of ``query`` for jobs of models at these locations in these batches; none means all batches.

    ``query`` selects jobs, their ``batch_id`` and their ``location`` among other columns.
    """
    places, batches = set(locations), set(batch_ids)
    if batches and (len(places) > VALUES_AT_ONCE or _have_at_most(session, batches, _JOBS_PER_MODEL * len(places))):
        for some in in_chunks(sorted(batches)):
            yield from (row for row in session.execute(query.where(Job.batch_id.in_(some))) if row.location in places)
        return
    for locations_ in in_chunks(sorted(places)):
        rows = session.execute(query.where(Job.location.in_(locations_)))
        yield from (row for row in rows if not batches or row.batch_id in batches)


def _have_at_most(session: Session, batch_ids: Collection[int], most: int) -> bool:
    """Whether these batches have ``most`` jobs together, of which no more are counted."""
    if len(batch_ids) > VALUES_AT_ONCE:
        return False
    first = select(Job.id).where(Job.batch_id.in_(batch_ids)).limit(most + 1).subquery()
    return session.execute(select(func.count()).select_from(first)).scalar_one() <= most
