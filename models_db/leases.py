"""Exclusive rights by name, by the database's clock: one worker a GPU, one leading scheduler.

A clock that was set back leaves leases that end long after any that is given now: they are cut to the longest.
"""

from __future__ import annotations

from sqlalchemy import delete, or_, update
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
    """Take or renew the lease ``name``; False where another holder's has not run out."""
    taken = session.execute(
        update(Lease)
        .where(Lease.name == name, or_(Lease.holder == holder, Lease.expires_at < db_now()))
        .values(holder=holder, expires_at=db_now(ttl_s))
        .returning(Lease.name),
        execution_options=NO_SYNC,
    )
    if taken.first() is not None:
        return True
    # By what it returns: SQLAlchemy does not know how many rows an INSERT on PostgreSQL made, and says -1.
    added = session.execute(
        insert_into(session, Lease)
        .values(name=name, holder=holder, expires_at=db_now(ttl_s))
        .on_conflict_do_nothing()
        .returning(Lease.name)
    )
    return added.first() is not None


def cut(session: Session, name: str, ttl_s: float) -> str | None:
    """Have a lease that ends later than one of ``ttl_s`` taken now end with it; the holder, where there was one.

    A holder that lives renews it, and loses nothing.
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
    """Give the lease up, if it is still ``holder``'s."""
    session.execute(
        delete(Lease).where(Lease.name == name, Lease.holder == holder),
        execution_options=NO_SYNC,
    )
