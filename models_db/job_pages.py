"""The first jobs of many, by the indexes that have them in order, so that the others are not read."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState
from qbatch.models_db.tables import Job


def first_jobs(
    session: Session,
    limit: int,
    *,
    batch_ids: Collection[int] = (),
    states: Collection[str] = (),
    conditions: Sequence[ColumnElement[bool]] = (),
) -> list[int]:
    """The ids of the first ``limit`` jobs, in the order of submission. No batches or no states means all of them."""
    # Each part is a range of an index. Together, they would have to be read as a whole and sorted.
    parts = [session.scalars(_first(part, conditions, limit)).all() for part in _ranges(batch_ids, states)]
    return list(islice(heapq.merge(*parts), limit))


def _first(part: Sequence[ColumnElement[bool]], conditions: Sequence[ColumnElement[bool]], limit: int) -> Select[int]:
    return select(Job.id).where(*part, *conditions).order_by(Job.id).limit(limit)


def _ranges(batch_ids: Collection[int], states: Collection[str]) -> Iterator[Sequence[ColumnElement[bool]]]:
    if batch_ids:
        for batch_id in set(batch_ids):
            yield from ((Job.batch_id == batch_id, Job.state == state) for state in set(states or JobState))
    elif states:
        yield from ((Job.state == state,) for state in set(states))
    else:
        yield ()


def count_jobs(session: Session, *, batch_ids: Collection[int] = (), states: Collection[str] = ()) -> int:
    """How many jobs there are in these batches and states; see ``first_jobs``."""
    counted = select(func.count()).select_from(Job)
    if batch_ids:
        counted = counted.where(Job.batch_id.in_(batch_ids))
    if states:
        counted = counted.where(Job.state.in_(states))
    return session.execute(counted).scalar_one()
