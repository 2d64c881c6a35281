"""Pauses of dispatch, for example while the storage is full. One row per reason; only this module writes them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.session import NO_SYNC, insert_into
from qbatch.models_db.tables import Pause

STORAGE_FULL = "storage_full"


def pause(session: Session, reason: str, message: str, *, needed_bytes: int | None, for_s: float) -> None:
    """Send nothing for ``for_s`` seconds, or until it is lifted. ``needed_bytes``: the room that would end it."""
    # A pause that is over must not count as the beginning of this one.
    session.execute(delete(Pause).where(Pause.until <= db_now()), execution_options=NO_SYNC)
    values = {"message": message, "needed_bytes": needed_bytes, "until": db_now(for_s)}
    session.execute(
        insert_into(session, Pause)
        .values(reason=reason, since=db_now(), **values)
        .on_conflict_do_update(index_elements=["reason"], set_=values)
    )


def in_force(session: Session) -> Sequence[Pause]:
    """The pauses in force now."""
    return session.scalars(select(Pause).where(Pause.until > db_now()).order_by(Pause.reason)).all()


def on_record(session: Session) -> Sequence[Pause]:
    """All recorded pauses: those in force, and those that have expired since the last one began."""
    return session.scalars(select(Pause).order_by(Pause.reason)).all()


def renew(session: Session, reason: str, for_s: float) -> None:
    """Have a pause that is on record hold for ``for_s`` seconds from now."""
    session.execute(update(Pause).where(Pause.reason == reason).values(until=db_now(for_s)), execution_options=NO_SYNC)


def shorten_future_times(session: Session, longest_s: float) -> int:
    """Shorten pauses that would last longer than ``longest_s`` because the clock was set back. Returns how many."""
    shortened = session.execute(
        update(Pause)
        .where(Pause.until > db_now(longest_s + SLACK_S))
        .values(until=db_now(longest_s))
        .returning(Pause.reason),
        execution_options=NO_SYNC,
    )
    return len(shortened.all())


def lift(session: Session, reason: str) -> None:
    """End a pause before its time."""
    session.execute(delete(Pause).where(Pause.reason == reason), execution_options=NO_SYNC)
