"""Exclusive rights by name, by the database's clock: one worker a GPU, one leading scheduler."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import CursorResult, delete, or_, update
from sqlalchemy.orm import Session

from models_db.clock import db_now
from models_db.session import insert_into
from models_db.tables import Lease


def acquire(session: Session, name: str, holder: str, ttl_s: float) -> bool:
    """Take or renew the lease ``name``; False where another holder's has not run out."""
    taken = session.execute(
        update(Lease)
        .where(Lease.name == name, or_(Lease.holder == holder, Lease.expires_at < db_now()))
        .values(holder=holder, expires_at=db_now(ttl_s)),
        execution_options={"synchronize_session": False},
    )
    if cast("CursorResult[Any]", taken).rowcount:
        return True
    added = session.execute(
        insert_into(session, Lease).values(name=name, holder=holder, expires_at=db_now(ttl_s)).on_conflict_do_nothing()
    )
    return bool(cast("CursorResult[Any]", added).rowcount)


def release(session: Session, name: str, holder: str) -> None:
    """Give the lease up, if it is still ``holder``'s."""
    session.execute(
        delete(Lease).where(Lease.name == name, Lease.holder == holder),
        execution_options={"synchronize_session": False},
    )
