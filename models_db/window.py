"""Which bundles are in Redis: about four per live worker (the window), chosen by priority and fair share.

All others wait in the database. ``dispatch_id`` is set on a queued job for which a message was sent.
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
"""The most jobs in one message. The rest of a larger bundle is sent when these have ended."""

NO_MESSAGE: Mapping[str, Any] = {"dispatch_id": None, "queue": None, "missed_scans": 0}
"""The dispatch columns of a job that no message stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """A message to send: the job ids of a bundle, and an id that is stored with the jobs."""

    dispatch_id: str
    queue: str
    priority: int
    job_ids: tuple[int, ...]
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRange:
    """Which bundles belong in a queue, by the memory they need, in bytes. The default accepts all.

    A bundle needs what its largest job needs, predicted or seen: ``over``, which the next smaller class holds, or
    more, and less than ``under``; None for the largest class there is, which also tries what is predicted to fit
    nowhere. ``largest`` is what that class holds: a job that was seen to need as much stands in no queue.
    """

    over: int | None = None
    under: int | None = None
    largest: int | None = None


ANY_NEED = QueueRange()


def choose(
    session: Session, *, kind: DeviceKind, queue: str, slots: int, needs: QueueRange = ANY_NEED
) -> list[Dispatch]:
    """Mark up to ``slots`` bundles as dispatched to ``queue`` and return their messages.

    A bundle with a higher priority than all bundles in the queue is added even if no slot is free.
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
    """The highest priority among queued jobs. A cheap check, because usually the window is full."""
    waiting = and_(Job.state == JobState.QUEUED, Job.dispatch_id.is_(None), Job.device.in_((kind, DeviceKind.AUTO)))
    highest = select(func.max(Job.priority)).where(waiting, *_belongs(NEED_BYTES, needs))
    if needs.under is not None:
        # A small job of a bundle with a large one belongs in another queue.
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
    """Move each job that is predicted to fit no GPU into a bundle of its own if other jobs of its bundle fit.

    It is then tried alone, so that the others need not wait for a job that will probably fail and end its runner.
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
    """The name of a bundle with only this job."""
    return f"{batch_id}:j{job_id}"


def _is_ready(needs: QueueRange) -> ColumnElement[bool]:
    """Whether a job may be dispatched.

    It must be queued, due, not dispatched, and not too large; no part of its bundle may be under way, and no other
    bundle may be writing its checkpoint. The rest of a bundle waits for the part that was sent, because that part
    writes its checkpoints and may include its baseline, and not every checkpoint key is known yet.
    """
    other = aliased(Job)
    # Not correlated, so that it is evaluated once for all jobs; few are under way.
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
    """Whether a job is running, and whether it is dispatched.

    Two conditions, because each has its own index: with an ``OR``, SQLite would read every job of the checkpoint. It
    uses no index for ``IS NOT NULL``, hence ``> ""``.
    """
    return job.state == JobState.RUNNING, job.dispatch_id > ""


def _share_of_batches(session: Session) -> Mapping[int, int]:
    """How many bundles of each batch are under way, in Redis or running."""
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
    """Lock the rows that match (at most ``most``) and return their ids, skipping those that others have locked.

    It never waits, so it cannot deadlock. Skipped jobs are considered again a second later.
    """
    query = select(Job.id).where(*conditions).order_by(Job.id).limit(most)
    return session.scalars(query.with_for_update(skip_locked=True, of=Job)).all()


def standing(session: Session) -> dict[str, str]:
    """All dispatched messages that no worker has claimed yet: dispatch id → queue."""
    rows = session.execute(
        select(Job.dispatch_id, Job.queue).where(Job.state == JobState.QUEUED, Job.dispatch_id.is_not(None)).distinct()
    )
    return {dispatch_id: queue for dispatch_id, queue in rows if dispatch_id is not None and queue is not None}


def note_scan(session: Session, *, missing: Collection[str], present: Collection[str]) -> list[str]:
    """Count a scan that did not find the ``missing`` messages in Redis, and release those missing twice in a row.

    One scan is not enough: between being popped and being recorded as unacknowledged, a message is nowhere in Redis.
    Returns the released dispatch ids, whose bundles can be sent again.
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
    """Mark the jobs of these messages as not sent, so that they can be sent again."""
    _undispatch(session, Job.dispatch_id.in_(dispatch_ids))


def recall(session: Session, served: Collection[str]) -> None:
    """Mark jobs in queues other than ``served`` as not sent, because no worker reads those queues any more."""
    _undispatch(session, Job.dispatch_id.is_not(None), Job.queue.not_in(served))


def _undispatch(session: Session, *conditions: ColumnElement[bool]) -> None:
    session.execute(
        update(Job).where(Job.id.in_(_free(session, *conditions, Job.state == JobState.QUEUED))).values(**NO_MESSAGE),
        execution_options=NO_SYNC,
    )
