"""What keeps bundles from being sent for a while: a storage without room. One row a reason; its only writer."""

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
    # One that is over is no beginning of this one.
    session.execute(delete(Pause).where(Pause.until <= db_now()), execution_options=NO_SYNC)
    values = {"message": message, "needed_bytes": needed_bytes, "until": db_now(for_s)}
    session.execute(
        insert_into(session, Pause)
        .values(reason=reason, since=db_now(), **values)
        .on_conflict_do_update(index_elements=["reason"], set_=values)
    )


def standing(session: Session) -> Sequence[Pause]:
    """The pauses that hold now."""
    return session.scalars(select(Pause).where(Pause.until > db_now()).order_by(Pause.reason)).all()


def noted(session: Session) -> Sequence[Pause]:
    """The pauses on record: those that hold, and those that ended by themselves since the last one began."""
    return session.scalars(select(Pause).order_by(Pause.reason)).all()


def renew(session: Session, reason: str, for_s: float) -> None:
    """Have a pause that is on record hold for ``for_s`` seconds from now."""
    session.execute(update(Pause).where(Pause.reason == reason).values(until=db_now(for_s)), execution_options=NO_SYNC)


def mend_times(session: Session, longest_s: float) -> int:
    """Cut pauses that end later than one of ``longest_s`` begun now: the database's clock was set back. How many."""
    mended = session.execute(
        update(Pause)
        .where(Pause.until > db_now(longest_s + SLACK_S))
        .values(until=db_now(longest_s))
        .returning(Pause.reason),
        execution_options=NO_SYNC,
    )
    return len(mended.all())


def lift(session: Session, reason: str) -> None:
    """End a pause before its time."""
    session.execute(delete(Pause).where(Pause.reason == reason), execution_options=NO_SYNC)
