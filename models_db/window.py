"""Which bundles stand in Redis: a window of about four for each live worker, chosen by priority and fair share.

The backlog stays in the database. ``dispatch_id`` marks a queued job that a message stands for.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from models_db.clock import db_now
from models_db.domain import DeviceKind, JobState, Method
from models_db.tables import Job

_NO_SYNC = {"synchronize_session": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """One message to send: a bundle's job ids, under an id that the database knows."""

    dispatch_id: str
    queue: str
    priority: int
    job_ids: tuple[int, ...]
    label: str


def choose(session: Session, *, kind: DeviceKind, queue: str, slots: int) -> list[Dispatch]:
    """Mark up to ``slots`` bundles as dispatched to ``queue`` and return their messages.

    A bundle of higher priority than all that stand in the queue gets in even when no slot is free.
    """
    standing = standing_bundles(session, queue)
    chosen: list[Dispatch] = []
    shares = Counter(_share_of_batches(session))
    ready = _ready(session, kind, limit=slots)
    while ready:
        best = min(ready, key=lambda row: (-row.priority, shares[row.batch_id], row.batch_id, row.first_id))
        ready.remove(best)
        if sum(n for priority, n in standing.items() if priority >= best.priority) >= slots:
            break
        dispatch = _mark(session, best.bundle, queue, best.priority)
        if dispatch is not None:
            chosen.append(dispatch)
            shares[best.batch_id] += 1
            standing[best.priority] = standing.get(best.priority, 0) + 1
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    bundle: str
    batch_id: int
    priority: int
    first_id: int


def _ready(session: Session, kind: DeviceKind, limit: int) -> list[_Ready]:
    """The first ``limit`` bundles of each batch that may be dispatched now."""
    bundles = (
        select(
            Job.bundle,
            Job.batch_id,
            func.max(Job.priority).label("priority"),
            func.min(Job.id).label("first_id"),
            func.row_number().over(partition_by=Job.batch_id, order_by=func.min(Job.id)).label("place"),
        )
        .where(_is_ready(), Job.device.in_((kind, DeviceKind.AUTO)))
        .group_by(Job.bundle, Job.batch_id)
        .subquery()
    )
    rows = session.execute(select(bundles).where(bundles.c.place <= limit)).all()
    return [
        _Ready(bundle=row.bundle, batch_id=row.batch_id, priority=row.priority, first_id=row.first_id) for row in rows
    ]


def _is_ready() -> ColumnElement[bool]:
    """Queued, due, not dispatched, and wanting no checkpoint that another bundle is writing."""
    other = aliased(Job)
    in_flight = (
        select(other.id)
        .where(
            other.checkpoint_key == Job.checkpoint_key,
            other.bundle != Job.bundle,
            other.method != Method.NONE,
            or_(other.state == JobState.RUNNING, other.dispatch_id.is_not(None)),
        )
        .correlate(Job)
        .exists()
    )
    return and_(
        Job.state == JobState.QUEUED,
        Job.dispatch_id.is_(None),
        or_(Job.not_before.is_(None), Job.not_before <= db_now()),
        ~in_flight,
    )


def _share_of_batches(session: Session) -> Mapping[int, int]:
    """How many bundles of each batch are under way: standing in Redis or running."""
    rows = session.execute(
        select(Job.batch_id, func.count(func.distinct(Job.bundle)))
        .where(or_(Job.state == JobState.RUNNING, Job.dispatch_id.is_not(None)))
        .group_by(Job.batch_id)
    )
    return {batch_id: count for batch_id, count in rows}


def standing_bundles(session: Session, queue: str) -> dict[int, int]:
    """How many dispatched bundles wait in ``queue``, by priority."""
    rows = session.execute(
        select(Job.priority, func.count(func.distinct(Job.dispatch_id)))
        .where(Job.state == JobState.QUEUED, Job.dispatch_id.is_not(None), Job.queue == queue)
        .group_by(Job.priority)
    )
    return {priority: count for priority, count in rows}


def _mark(session: Session, bundle: str, queue: str, priority: int) -> Dispatch | None:
    dispatch_id = str(uuid.uuid4())
    marked = session.execute(
        update(Job)
        .where(Job.id.in_(_free(session, Job.bundle == bundle, _is_ready())))
        .values(dispatch_id=dispatch_id, queue=queue, missed_scans=0)
        .returning(Job.id, Job.model),
        execution_options=_NO_SYNC,
    ).all()
    if not marked:
        return None
    ids = tuple(sorted(row.id for row in marked))
    label = f"{marked[0].model}: {', '.join(f'j{n}' for n in ids)}"
    return Dispatch(dispatch_id=dispatch_id, queue=queue, priority=priority, job_ids=ids, label=label)


def _free(session: Session, *conditions: ColumnElement[bool]) -> Sequence[int]:
    """The ids of these rows, locked, but for those that a claim or a cancel holds: never waiting, never in a deadlock.

    A job left out for that reason is looked at again a second later.
    """
    query = select(Job.id).where(*conditions).order_by(Job.id)
    return session.scalars(query.with_for_update(skip_locked=True, of=Job)).all()


def standing(session: Session) -> dict[str, str]:
    """Every dispatched message that nobody has claimed yet: dispatch id → queue."""
    rows = session.execute(
        select(Job.dispatch_id, Job.queue).where(Job.state == JobState.QUEUED, Job.dispatch_id.is_not(None)).distinct()
    )
    return {dispatch_id: queue for dispatch_id, queue in rows if dispatch_id is not None and queue is not None}


def note_scan(session: Session, *, missing: Collection[str], present: Collection[str]) -> list[str]:
    """Count a scan that found ``missing`` messages in no list of Redis; take those missed twice out of the window.

    One scan is not enough: a message is on no list for the moment between its pop and its note as unacknowledged.
    Returns the dispatch ids taken out, whose bundles are ready to be sent again.
    """
    waiting = _free(session, Job.dispatch_id.in_([*missing, *present]), Job.state == JobState.QUEUED)
    session.execute(
        update(Job)
        .where(Job.id.in_(waiting), Job.dispatch_id.in_(present), Job.missed_scans > 0)
        .values(missed_scans=0),
        execution_options=_NO_SYNC,
    )
    session.execute(
        update(Job).where(Job.id.in_(waiting), Job.dispatch_id.in_(missing)).values(missed_scans=Job.missed_scans + 1),
        execution_options=_NO_SYNC,
    )
    gone = session.scalars(
        select(Job.dispatch_id)
        .where(Job.id.in_(waiting), Job.dispatch_id.in_(missing), Job.missed_scans >= 2)
        .distinct()
    ).all()
    take_out(session, [dispatch_id for dispatch_id in gone if dispatch_id is not None])
    return sorted(dispatch_id for dispatch_id in gone if dispatch_id is not None)


def take_out(session: Session, dispatch_ids: Collection[str]) -> None:
    """Forget that these messages were sent; their jobs are ready again."""
    session.execute(
        update(Job)
        .where(Job.id.in_(_free(session, Job.dispatch_id.in_(dispatch_ids), Job.state == JobState.QUEUED)))
        .values(dispatch_id=None, queue=None, missed_scans=0),
        execution_options=_NO_SYNC,
    )
