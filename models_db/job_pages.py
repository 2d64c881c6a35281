"""The first jobs of many, by the indexes that have them in order, so that the others are not read."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState
from qbatch.models_db.tables import Job

_LEAST_AT_ONCE = 20


def first_jobs(
    session: Session,
    limit: int,
    *,
    batch_ids: Collection[int] = (),
    states: Collection[str] = (),
    conditions: Sequence[ColumnElement[bool]] = (),
) -> list[int]:
    """The ids of the first ``limit`` jobs, in the order of submission. No batches or no states means all of them."""
    return list(islice(_in_order(session, limit, batch_ids, states, conditions), limit))


def pages_of_jobs(
    session: Session, size: int, *, batch_ids: Collection[int] = (), conditions: Sequence[ColumnElement[bool]] = ()
) -> Iterator[Sequence[int]]:
    """The ids of the jobs, in the order of submission, ``size`` at a time. No batches means all of them."""
    ids = _in_order(session, size, batch_ids, (), conditions)
    while page := list(islice(ids, size)):
        yield page


def _in_order(
    session: Session,
    size: int,
    batch_ids: Collection[int],
    states: Collection[str],
    conditions: Sequence[ColumnElement[bool]],
) -> Iterator[int]:
    # Each part is a range of an index. Together, they would have to be read as a whole and sorted.
    parts = list(_ranges(batch_ids, states))
    # So many of each at a time that what is read of all parts is about as much as is asked for.
    some = max(_LEAST_AT_ONCE, size // len(parts))
    return heapq.merge(*(_part(session, [*part, *conditions], some) for part in parts))


def _part(session: Session, conditions: Sequence[ColumnElement[bool]], size: int) -> Iterator[int]:
    """The jobs of one part, read ``size`` at a time when they are needed."""
    last = 0
    while True:
        found = session.scalars(select(Job.id).where(*conditions, Job.id > last).order_by(Job.id).limit(size)).all()
        yield from found
        if len(found) < size:
            return
        last = found[-1]


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
