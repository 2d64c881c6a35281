"""Which bundles stand in Redis: a window of about four for each live worker, chosen by priority and fair share.

The backlog stays in the database. ``dispatch_id`` marks a queued job that a message stands for.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select, true, update
from sqlalchemy.orm import Session, aliased

from qbatch.core.domain import DeviceKind, JobState, Method
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.memory_need import NEED_BYTES, may_run_in
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Job

MOST_JOBS = 256
"""In one message. What is left of a larger bundle goes in the next one, once these have ended."""

NO_MESSAGE: Mapping[str, Any] = {"dispatch_id": None, "queue": None, "missed_scans": 0}
"""The dispatch columns of a job that no message stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """One message to send: a bundle's job ids, under an id that the database knows."""

    dispatch_id: str
    queue: str
    priority: int
    job_ids: tuple[int, ...]
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRange:
    """Which bundles belong into a queue, in bytes. The default takes all.

    A bundle needs what its largest job needs, predicted or seen: ``over``, which the next smaller class holds, or
    more, and less than ``under``; None for the largest class there is, which also tries what is predicted to fit
    nowhere. ``largest`` is what that class holds: a job that was seen to need as much stands in no queue.
    """

    over: int | None = None
    under: int | None = None
    largest: int | None = None


ANYNEED_BYTES = QueueRange()


def choose(
    session: Session, *, kind: DeviceKind, queue: str, slots: int, needs: QueueRange = ANYNEED_BYTES
) -> list[Dispatch]:
    """Mark up to ``slots`` bundles as dispatched to ``queue`` and return their messages.

    A bundle of higher priority than all that stand in the queue gets in even when no slot is free.
    """
    standing = standing_bundles(session, queue)
    highest = _highest_priority(session, kind, needs)
    if highest is None or _as_urgent(standing, highest) >= slots:
        return []
    chosen: list[Dispatch] = []
    shares = Counter(_share_of_batches(session))
    ready = _ready(session, kind, needs, limit=slots)
    if kind is DeviceKind.CUDA and _split_off(session, ready, needs):
        ready = _ready(session, kind, needs, limit=slots)
    while ready:
        best = min(ready, key=lambda row: (-row.priority, shares[row.batch_id], row.batch_id, row.first_id))
        ready.remove(best)
        if _as_urgent(standing, best.priority) >= slots:
            break
        dispatch = _mark(session, best.bundle, queue, best.priority, needs)
        if dispatch is not None:
            chosen.append(dispatch)
            shares[best.batch_id] += 1
            standing[best.priority] = standing.get(best.priority, 0) + 1
    return chosen


def _as_urgent(standing: Mapping[int, int], lowest: int) -> int:
    return sum(count for priority, count in standing.items() if priority >= lowest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """``least`` and ``most`` are the needs of its smallest and largest job, in bytes."""

    bundle: str
    batch_id: int
    priority: int
    first_id: int
    least: int
    most: int


def _highest_priority(session: Session, kind: DeviceKind, needs: QueueRange) -> int | None:
    """Of what may be ready. A cheap look, since most of the time the window is full and the backlog long."""
    waiting = and_(Job.state == JobState.QUEUED, Job.dispatch_id.is_(None), Job.device.in_((kind, DeviceKind.AUTO)))
    highest = select(func.max(Job.priority)).where(waiting, *_belongs(NEED_BYTES, needs))
    if needs.under is not None:
        # A small job of a large bundle belongs elsewhere.
        bundles = select(func.max(Job.priority).label("priority")).where(waiting).group_by(Job.bundle)
        highest = select(func.max(bundles.having(*_belongs(func.max(NEED_BYTES), needs)).subquery().c.priority))
    return session.execute(highest).scalar_one()


def _belongs(need: ColumnElement[int], needs: QueueRange) -> list[ColumnElement[bool]]:
    at_least = [] if needs.over is None else [need >= needs.over]
    return at_least if needs.under is None else [*at_least, need < needs.under]


def _ready(session: Session, kind: DeviceKind, needs: QueueRange, limit: int) -> list[_Ready]:
    """The first ``limit`` bundles of each batch that may be dispatched now, and belong into ``needs``."""
    most = func.max(NEED_BYTES)
    bundles = (
        select(
            Job.bundle,
            Job.batch_id,
            func.max(Job.priority).label("priority"),
            func.min(Job.id).label("first_id"),
            func.min(NEED_BYTES).label("least"),
            most.label("most"),
            func.row_number().over(partition_by=Job.batch_id, order_by=func.min(Job.id)).label("place"),
        )
        .where(_is_ready(needs), Job.device.in_((kind, DeviceKind.AUTO)))
        .group_by(Job.bundle, Job.batch_id)
        .having(*_belongs(most, needs))
        .subquery()
    )
    rows = session.execute(select(bundles).where(bundles.c.place <= limit)).mappings()
    return [_Ready(**{name: value for name, value in row.items() if name != "place"}) for row in rows]


def _split_off(session: Session, ready: Sequence[_Ready], needs: QueueRange) -> bool:
    """Give each job that even the largest class is predicted not to hold a bundle of its own, where others fit.

    It is tried alone then: the others do not wait for what will probably fail, nor for the runner that it takes along.
    """
    if needs.largest is None or needs.under is not None:
        return False
    mixed = [row.bundle for row in ready if row.least < needs.largest <= row.most]
    if not mixed:
        return False
    misfits = _free(session, Job.bundle.in_(mixed), _is_ready(needs), needs.largest <= NEED_BYTES)
    for batch_id, job_id in session.execute(select(Job.batch_id, Job.id).where(Job.id.in_(misfits))).all():
        alone = update(Job).where(Job.id == job_id).values(bundle=own_bundle(batch_id, job_id))
        session.execute(alone, execution_options=NO_SYNC)
    return bool(misfits)


def own_bundle(batch_id: int, job_id: int) -> str:
    """The name of a bundle that no other job is in."""
    return f"{batch_id}:j{job_id}"


def _is_ready(needs: QueueRange) -> ColumnElement[bool]:
    """Queued, due, not dispatched, not too large, of a bundle that is not under way, and wanting no checkpoint that
    another one is writing.

    The rest of a bundle waits for the part of it that was sent: that writes its checkpoints, and may hold its baseline.
    Not every checkpoint's key is known by then.
    """
    other = aliased(Job)
    # Not correlated: it is looked up once for all jobs, and few are under way.
    under_way = [select(other.bundle).where(condition) for condition in _under_way(other)]
    writes_it = (other.checkpoint_key == Job.checkpoint_key, other.bundle != Job.bundle, other.method != Method.NONE)
    written = [select(other.id).where(*writes_it, condition).correlate(Job).exists() for condition in _under_way(other)]
    return and_(
        Job.state == JobState.QUEUED,
        Job.dispatch_id.is_(None),
        is_due(),
        true() if needs.largest is None else may_run_in(needs.largest),
        *(Job.bundle.not_in(bundles) for bundles in under_way),
        *(~exists for exists in written),
    )


def is_due() -> ColumnElement[bool]:
    """A job whose backoff is over."""
    return or_(Job.not_before.is_(None), Job.not_before <= db_now())


def _under_way(job: type[Job]) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Running, or sent. Two conditions, each with an index of its own: of an ``OR``, SQLite would look at every job of
    the checkpoint. It uses none for ``IS NOT NULL``."""
    return job.state == JobState.RUNNING, job.dispatch_id > ""


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


def _mark(session: Session, bundle: str, queue: str, priority: int, needs: QueueRange) -> Dispatch | None:
    dispatch_id = str(uuid.uuid4())
    marked = session.execute(
        update(Job)
        .where(Job.id.in_(_free(session, Job.bundle == bundle, _is_ready(needs), most=MOST_JOBS)))
        .values(dispatch_id=dispatch_id, queue=queue, missed_scans=0)
        .returning(Job.id, Job.model),
        execution_options=NO_SYNC,
    ).all()
    if not marked:
        return None
    ids = tuple(sorted(row.id for row in marked))
    label = f"{marked[0].model}: {', '.join(f'j{n}' for n in ids)}"
    return Dispatch(dispatch_id=dispatch_id, queue=queue, priority=priority, job_ids=ids, label=label)


def _free(session: Session, *conditions: ColumnElement[bool], most: int | None = None) -> Sequence[int]:
    """The ids of these rows (the first ``most``), locked, but for those that a claim or a cancel holds: never waiting,
    never in a deadlock.

    A job left out for that reason is looked at again a second later.
    """
    query = select(Job.id).where(*conditions).order_by(Job.id).limit(most)
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
        execution_options=NO_SYNC,
    )
    session.execute(
        update(Job).where(Job.id.in_(waiting), Job.dispatch_id.in_(missing)).values(missed_scans=Job.missed_scans + 1),
        execution_options=NO_SYNC,
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
    _undispatch(session, Job.dispatch_id.in_(dispatch_ids))


def recall(session: Session, served: Collection[str]) -> None:
    """Take out what stands in other queues than ``served``: no worker is left that would read it there."""
    _undispatch(session, Job.dispatch_id.is_not(None), Job.queue.not_in(served))


def _undispatch(session: Session, *conditions: ColumnElement[bool]) -> None:
    session.execute(
        update(Job).where(Job.id.in_(_free(session, *conditions, Job.state == JobState.QUEUED))).values(**NO_MESSAGE),
        execution_options=NO_SYNC,
    )
