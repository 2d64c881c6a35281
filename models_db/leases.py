"""Named locks that expire by the database's clock: one worker per GPU, and one leading scheduler.

After the clock is set back, leases taken before would last much longer than intended; ``cut`` shortens them.
"""

from __future__ import annotations

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.session import NO_SYNC, insert_into
from qbatch.models_db.tables import Lease

LEAD = "scheduler"
"""The lease of the scheduler that leads."""


def of_gpu(uuid: str) -> str:
    """The lease of the worker that has this GPU."""
    return f"gpu:{uuid}"


def acquire(session: Session, name: str, holder: str, ttl_s: float) -> bool:
    """Take or renew the lease ``name``. Returns False if another holder's lease has not expired."""
    taken = session.execute(
        update(Lease)
        .where(Lease.name == name, or_(Lease.holder == holder, Lease.expires_at < db_now()))
        .values(holder=holder, expires_at=db_now(ttl_s))
        .returning(Lease.name),
        execution_options=NO_SYNC,
    )
    if taken.first() is not None:
        return True
    # RETURNING, because SQLAlchemy reports -1 as the number of rows of such an INSERT on PostgreSQL.
    added = session.execute(
        insert_into(session, Lease)
        .values(name=name, holder=holder, expires_at=db_now(ttl_s))
        .on_conflict_do_nothing()
        .returning(Lease.name)
    )
    return added.first() is not None


def holder(session: Session, name: str, longest_s: float | None = None) -> str | None:
    """Who holds the lease ``name`` now; None if nobody does. One that lasts longer than ``longest_s`` does not count:
    it is from before the clock was set back."""
    held = select(Lease.holder).where(Lease.name == name, Lease.expires_at > db_now())
    if longest_s is not None:
        held = held.where(Lease.expires_at <= db_now(longest_s))
    return session.scalars(held).first()


def cut(session: Session, name: str, ttl_s: float) -> str | None:
    """Shorten a lease that would last longer than ``ttl_s`` from now. Returns its holder, or None if it did not.

    A holder that is alive renews it, so it loses nothing.
    """
    holders = session.execute(
        update(Lease)
        .where(Lease.name == name, Lease.expires_at > db_now(ttl_s + SLACK_S))
        .values(expires_at=db_now(ttl_s))
        .returning(Lease.holder),
        execution_options=NO_SYNC,
    ).scalars()
    return next(iter(holders), None)


def release(session: Session, name: str, holder: str) -> None:
    """Release the lease if ``holder`` still holds it."""
    session.execute(
        delete(Lease).where(Lease.name == name, Lease.holder == holder),
        execution_options=NO_SYNC,
    )
