"""Which bundles are in Redis: about four per live worker (the window), chosen by priority and fair share.

All others wait in the database. ``dispatch_id`` is set on a queued job for which a message was sent.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

from sqlalchemy import ColumnElement, and_, func, select, union, update
from sqlalchemy.orm import Session, aliased

from qbatch.core.domain import DeviceKind, Method, format_batch_id, format_job_id
from qbatch.models_db.backlog_looks import BacklogLooks
from qbatch.models_db.few_jobs import IS_QUEUED
from qbatch.models_db.mixture_origins import MIXTURE_COLUMNS, mixture_origin
from qbatch.models_db.ready_bundles import (
    ANY_NEED,
    QueueRange,
    ReadyBundle,
    ReadyBundles,
    are_ready,
    free,
    is_under_way,
)
from qbatch.models_db.session import NO_SYNC, in_chunks
from qbatch.models_db.tables import Job

MOST_JOBS = 256
"""The most jobs in one message. The rest of a larger bundle is sent when these have ended."""

NO_MESSAGE: Mapping[str, Any] = {"dispatch_id": None, "queue": None, "missed_scans": 0}
"""The dispatch columns of a job that no message stands for."""

_MOST_MISSES = 2
_CHOOSER_LOCK = 0x71620001
# A worker refuses a message with a long text, and people would not read it.
_LONGEST_NAME = 200
_MOST_NAMED = 8
_OVER = object()
_OTHER = aliased(Job)
# By ids, because there are few.
IS_DISPATCHED: ColumnElement[bool] = and_(Job.id.in_(select(_OTHER.id).where(_OTHER.dispatch_id > "")), IS_QUEUED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """A message to send: the job ids of a bundle, and an id that is stored with the jobs."""

    dispatch_id: str
    queue: str
    priority: int
    job_ids: tuple[int, ...]
    label: str


def is_only_chooser(session: Session) -> bool:
    """Whether no other transaction is open that was told so; it stays so until this one ends. Two that choose at once
    do not see each other's marks. SQLite has one writer at a time anyway."""
    if session.get_bind().dialect.name == "sqlite":
        return True
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(_CHOOSER_LOCK))))


def choose(
    session: Session,
    *,
    kind: DeviceKind,
    queue: str,
    slots: int,
    needs: QueueRange = ANY_NEED,
    most: int | None = None,
    looks: BacklogLooks | None = None,
) -> list[Dispatch]:
    """Mark bundles as dispatched to ``queue`` until ``slots`` are there, and return their messages, ``most`` of them.

    A bundle with a higher priority than all bundles in the queue is added even if no slot is free. ``looks``: what was
    found of a backlog that mostly belongs in other queues; where nothing was, a look is asked for there.
    """
    looks = BacklogLooks() if looks is None else looks
    chosen: list[Dispatch] = []
    ready = ReadyBundles(kind=kind, needs=needs)
    in_queue = _waiting_in(session, queue)
    priority = ready.highest_priority(session, above=_full_at(in_queue, slots), below=None)
    shares = _share_of_batches(session) if priority is not None else {}
    while priority is not None:
        missing = slots - _as_urgent(in_queue, priority)
        if most is not None:
            missing = min(missing, most - len(chosen))
        added = _choose_fairly(session, ready, priority, shares, looks, queue=queue, most=missing)
        chosen += added
        in_queue[priority] = in_queue.get(priority, 0) + len(added)
        if len(added) == missing or looks.is_wanted:
            break
        priority = ready.highest_priority(session, above=_full_at(in_queue, slots), below=priority)
    return chosen


def _as_urgent(in_queue: Mapping[int, int], lowest: int) -> int:
    return sum(count for priority, count in in_queue.items() if priority >= lowest)


def _full_at(in_queue: Mapping[int, int], slots: int) -> int | None:
    """The highest priority for which no slot is free; None if there is none."""
    return max((priority for priority in in_queue if _as_urgent(in_queue, priority) >= slots), default=None)


def _choose_fairly(
    session: Session,
    ready: ReadyBundles,
    priority: int,
    shares: Mapping[int, int],
    looks: BacklogLooks,
    *,
    queue: str,
    most: int,
) -> list[Dispatch]:
    """Mark up to ``most`` bundles of that priority; each time it is the turn of the batch with the smallest share."""
    chosen: list[Dispatch] = []
    known = looks.take_found((queue, priority))
    if known is None:
        waiting = {
            batch_id: ready.of_batch(session, priority, batch_id) for batch_id in ready.batches(session, priority)
        }
    else:
        waiting = {batch_id: ready.named(session, names) for batch_id, names in known.items()}
    turns = [(shares.get(batch_id, 0), batch_id) for batch_id in waiting]
    heapify(turns)
    misses = 0
    while turns and len(chosen) < most:
        if misses == _MOST_MISSES and known is None:
            # Most of what waits belongs in another queue: what does not is found faster by looking at all of it.
            looks.want((queue, priority), ready, most)
            break
        share, batch_id = heappop(turns)
        found = next(waiting[batch_id], _OVER)
        if found is _OVER:
            continue
        dispatch = None
        if isinstance(found, ReadyBundle):
            dispatch = _mark(session, found.bundle, queue, priority, ready.needs)
        if dispatch is None:
            misses += 1
        else:
            chosen.append(dispatch)
            share += 1
        heappush(turns, (share, batch_id))
    return chosen


def _share_of_batches(session: Session) -> Mapping[int, int]:
    """How many bundles of each batch are under way, in Redis or running."""
    each = [select(Job.batch_id, Job.bundle).where(condition) for condition in is_under_way(Job)]
    bundles = union(*each).subquery()
    rows = session.execute(select(bundles.c.batch_id, func.count()).group_by(bundles.c.batch_id))
    return {batch_id: count for batch_id, count in rows}


def _waiting_in(session: Session, queue: str) -> dict[int, int]:
    """How many dispatched bundles wait in ``queue``, by priority."""
    rows = session.execute(
        select(Job.priority, func.count(func.distinct(Job.dispatch_id)))
        .where(IS_DISPATCHED, Job.queue == queue)
        .group_by(Job.priority)
    )
    return {priority: count for priority, count in rows}


def _mark(session: Session, bundle: str, queue: str, priority: int, needs: QueueRange) -> Dispatch | None:
    dispatch_id = str(uuid.uuid4())
    marked = session.execute(
        update(Job)
        .where(Job.id.in_(free(session, are_ready([bundle], needs), most=MOST_JOBS)))
        .values(dispatch_id=dispatch_id, queue=queue, missed_scans=0)
        .returning(Job.id, Job.batch_id, Job.model, Job.method, *MIXTURE_COLUMNS),
        execution_options=NO_SYNC,
    ).all()
    if not marked:
        return None
    ids = tuple(sorted(row.id for row in marked))
    methods = [f"{row.method}{mixture_origin(row).title}" for row in sorted(marked, key=lambda row: row.id)]
    label = label_of(marked[0].batch_id, marked[0].model, methods, ids)
    return Dispatch(dispatch_id=dispatch_id, queue=queue, priority=priority, job_ids=ids, label=label)


def label_of(batch_id: int, model: str, methods: Sequence[str], job_ids: Sequence[int]) -> str:
    """What Celery and Flower show of a message: ``b3 org/model: baseline, scheme · j7, j8``. Its length is bounded."""
    name = model if len(model) <= _LONGEST_NAME else f"…{model[1 - _LONGEST_NAME :]}"
    schemes = ", ".join("baseline" if method == Method.NONE else method for method in dict.fromkeys(methods))
    jobs = ", ".join(map(format_job_id, job_ids[:_MOST_NAMED]))
    more = len(job_ids) - _MOST_NAMED
    return f"{format_batch_id(batch_id)} {name}: {schemes} · {jobs}" + (f" and {more} more" if more > 0 else "")


def waiting_messages(session: Session) -> dict[str, str]:
    """All dispatched messages that no worker has claimed yet: dispatch id → queue."""
    rows = session.execute(select(Job.dispatch_id, Job.queue).where(IS_DISPATCHED).distinct())
    return {dispatch_id: queue for dispatch_id, queue in rows if dispatch_id is not None and queue is not None}


def record_scan(session: Session, *, missing: Collection[str], present: Collection[str]) -> list[str]:
    """Count a scan that did not find the ``missing`` messages in Redis, and release those missing twice in a row.

    One scan is not enough: between being popped and being recorded as unacknowledged, a message is nowhere in Redis.
    Returns the released dispatch ids, whose bundles can be sent again.
    """
    gone: set[str] = set()
    for ids in in_chunks(free(session, _of_messages([*missing, *present]), IS_QUEUED)):
        these = Job.id.in_(ids)
        session.execute(
            update(Job).where(these, Job.dispatch_id.in_(present), Job.missed_scans > 0).values(missed_scans=0),
            execution_options=NO_SYNC,
        )
        is_missing = Job.dispatch_id.in_(missing)
        session.execute(
            update(Job).where(these, is_missing).values(missed_scans=Job.missed_scans + 1), execution_options=NO_SYNC
        )
        twice = select(Job.dispatch_id).where(these, is_missing, Job.missed_scans >= 2).distinct()
        gone |= {dispatch_id for dispatch_id in session.scalars(twice) if dispatch_id is not None}
    take_out(session, gone)
    return sorted(gone)


def _of_messages(dispatch_ids: Collection[str]) -> ColumnElement[bool]:
    return Job.id.in_(select(_OTHER.id).where(_OTHER.dispatch_id.in_(dispatch_ids)))


def take_out(session: Session, dispatch_ids: Collection[str]) -> None:
    """Mark the jobs of these messages as not sent, so that they can be sent again."""
    _undispatch(session, _of_messages(dispatch_ids))


def recall(session: Session, served: Collection[str]) -> None:
    """Mark jobs in queues other than ``served`` as not sent, because no worker reads those queues any more."""
    _undispatch(session, IS_DISPATCHED, Job.queue.not_in(served))


def _undispatch(session: Session, *conditions: ColumnElement[bool]) -> None:
    for ids in in_chunks(free(session, *conditions, IS_QUEUED)):
        session.execute(update(Job).where(Job.id.in_(ids)).values(**NO_MESSAGE), execution_options=NO_SYNC)
