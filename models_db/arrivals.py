"""Store a batch chunk by chunk, in such a way that nobody sees it before it is whole.

On PostgreSQL all chunks are one transaction: nobody waits for it, nobody sees what it has not committed, and if its
process is killed the server undoes it.

SQLite has one writer at a time, so there each chunk is a transaction of its own. A row of ``arrivals`` stands for a
batch that is not whole yet. While it is there, ``arrival_filter`` hides the batch and its jobs from every statement of
every session. Deleting it is all that the last transaction does to make them visible, however many they are. The row
says when its submit was last heard of. If that is longer ago than a lease, the scheduler removes the jobs, then the
row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState
from qbatch.core.errors import DatabaseUnreachable
from qbatch.models_db.arrival_filter import ALSO_ARRIVING
from qbatch.models_db.batches import JobRows, NewJob, add_empty_batch, add_jobs
from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.finished_results import keep
from qbatch.models_db.session import NO_SYNC, Database, in_chunks
from qbatch.models_db.tables import Arrival, Batch, Job, Result

_REMOVED_AT_ONCE = 2000
# Long enough for everybody who waits to look at the lock twice.
_LONGEST_TURN_S = 0.05
_UNSEEN = {**NO_SYNC, **ALSO_ARRIVING}


Transaction = Callable[[], AbstractContextManager[Session]]


class Arriving:
    """A batch that is being stored."""

    def __init__(self, batch_id: int, rows: JobRows, transaction: Transaction) -> None:
        self.batch_id = batch_id
        self.is_published = False
        self._rows = rows
        self._transaction = transaction
        self._last_chunk: Sequence[Sequence[NewJob]] = ()
        self._answered = 0
        self._heard_s = time.monotonic()

    def add(self, bundles: Sequence[Sequence[NewJob]]) -> None:
        """Add whole bundles: at most as many as others can wait for."""
        if self._last_chunk:
            chunk = self._rows.of(self._last_chunk)
            with self._transaction() as session:
                self._store(session, chunk)
        self._last_chunk = bundles

    def be_heard(self, every_s: float) -> None:
        """Say that this submit lives, if it has said nothing for ``every_s``: to look at what may answer a chunk can
        take longer than a lease."""
        if time.monotonic() - self._heard_s >= every_s:
            with self._transaction() as session:
                self._renew(session)

    def publish(self, look_again: Callable[[Session, int], int]) -> int:
        """Store the last chunk and make the batch visible. Returns how many of its jobs are answered by earlier ones.

        ``look_again`` gets the session and the batch's id. It ends the jobs that were answered since they were added,
        and returns how many there were.
        """
        chunk = self._rows.of(self._last_chunk)
        with self._transaction() as session:
            self._store(session, chunk)
            self._answered += look_again(session, self.batch_id)
            session.execute(delete(Arrival).where(Arrival.batch_id == self.batch_id), execution_options=NO_SYNC)
        self.is_published = True
        return self._answered

    def _store(self, session: Session, rows: Sequence[dict[str, Any]]) -> None:
        self._renew(session)
        answers = {row["reused_from"] for row in rows} - {None}
        still_there = keep(session, answers)
        for row in rows:
            row["reused_from"] = row["reused_from"] if row["reused_from"] in still_there else None
        add_jobs(session, rows)
        self._answered += sum(row["reused_from"] is not None for row in rows)

    def _renew(self, session: Session) -> None:
        renewed = session.execute(
            update(Arrival)
            .where(Arrival.batch_id == self.batch_id, Arrival.abandoned.is_(False))
            .values(seen_at=db_now())
            .returning(Arrival.batch_id),
            execution_options=NO_SYNC,
        )
        if renewed.first() is None:
            raise DatabaseUnreachable(
                "this submit was silent for longer than QBATCH_LEASE_S, so what it had stored was removed: submit again"
            )
        self._heard_s = time.monotonic()


@contextmanager
def arriving(database: Database, *, name: str | None, priority: int, time_limit_s: float | None) -> Iterator[Arriving]:
    """Begin a batch. Its jobs must be added and published within the context, or nobody will ever see it."""
    with _begun(database, name, priority) as (batch_id, transaction):
        batch = Arriving(batch_id, JobRows(batch_id, priority=priority, time_limit_s=time_limit_s), transaction)
        yield batch
        if not batch.is_published:
            raise RuntimeError(f"batch {batch_id} was not published")


@contextmanager
def _begun(database: Database, name: str | None, priority: int) -> Iterator[tuple[int, Transaction]]:
    with database.write() as session:
        batch_id = add_empty_batch(session, name=name, priority=priority)
        session.add(Arrival(batch_id=batch_id))
        session.flush()
        if not database.is_sqlite:
            yield batch_id, lambda: nullcontext(session)
    if database.is_sqlite:
        yield batch_id, _Turns(database).take


class _Turns:
    """Transactions between which SQLite's lock is free for a while.

    Whoever waits for it only looks from time to time (see ``write_lock``), and would seldom find it free otherwise.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._free_until = 0.0

    @contextmanager
    def take(self) -> Iterator[Session]:
        time.sleep(max(0.0, self._free_until - time.monotonic()))
        with self._database.write() as session:
            began = time.monotonic()
            yield session
        ended = time.monotonic()
        self._free_until = ended + min(ended - began, _LONGEST_TURN_S)


def answerable_since(session: Session, batch_id: int, moment: datetime) -> Sequence[Job]:
    """The queued jobs of a batch for whose checkpoint key a result was recorded since ``moment``."""
    measured = select(Job.checkpoint_key).join(Result, Result.job_id == Job.id).where(Result.created_at >= moment)
    keys = sorted({key for key in session.scalars(measured) if key is not None})
    found: list[Job] = []
    for chunk in in_chunks(keys):
        wants = select(Job).where(Job.checkpoint_key.in_(chunk), Job.state == JobState.QUEUED, Job.force.is_(False))
        # The batch is compared here: SQLite would rather read all of its jobs than use the index of keys.
        found += [job for job in session.scalars(wants, execution_options=ALSO_ARRIVING) if job.batch_id == batch_id]
    return found


def known_searches(session: Session, batch_id: int) -> Sequence[Job]:
    """The queued searches of a batch whose keys are known, without those that were forced."""
    asked = (Job.search.is_not(None), Job.checkpoint_key.is_not(None), Job.force.is_(False))
    found = select(Job).where(Job.batch_id == batch_id, Job.state == JobState.QUEUED, *asked).order_by(Job.id)
    return session.scalars(found, execution_options=ALSO_ARRIVING).all()


def remove_silent(database: Database, lease_s: float) -> list[int]:
    """Remove some jobs of each batch whose submit was silent for ``lease_s``. Returns the ids of those now gone.

    Call it again and again: each call deletes as much as others can wait for.
    """
    with database.read() as session:
        silent = session.scalars(select(Arrival.batch_id).where(_is_silent(lease_s))).all()
    return [batch_id for batch_id in silent if _remove_some(database, batch_id, lease_s)]


def _is_silent(lease_s: float) -> ColumnElement[bool]:
    return or_(Arrival.abandoned.is_(True), Arrival.seen_at < db_now(-lease_s))


def _remove_some(database: Database, batch_id: int, lease_s: float) -> bool:
    """Remove some jobs. If none is left, remove the batch and return True."""
    with database.write() as session:
        # From now on its submit cannot go on, should it only have slept.
        is_ours = session.execute(
            update(Arrival)
            .where(Arrival.batch_id == batch_id, _is_silent(lease_s))
            .values(abandoned=True)
            .returning(Arrival.batch_id),
            execution_options=NO_SYNC,
        ).first()
        if is_ours is None:
            return False
        some = select(Job.id).where(Job.batch_id == batch_id).limit(_REMOVED_AT_ONCE)
        removed = session.scalars(delete(Job).where(Job.id.in_(some)).returning(Job.id), execution_options=_UNSEEN)
        if len(removed.all()) == _REMOVED_AT_ONCE:
            return False
        session.execute(delete(Arrival).where(Arrival.batch_id == batch_id), execution_options=NO_SYNC)
        session.execute(delete(Batch).where(Batch.id == batch_id), execution_options=_UNSEEN)
        return True


def shorten_future_times(session: Session) -> int:
    """Set times in the future to now, and return how many there were. See ``workers.shorten_future_times``."""
    ahead = Arrival.seen_at > db_now(SLACK_S)
    changed = session.execute(
        update(Arrival).where(ahead).values(seen_at=db_now()).returning(Arrival.batch_id), execution_options=NO_SYNC
    )
    return len(changed.all())
