"""The identity of a database, which tells it from others on the same storage or at the same URL. Copies share it."""

from __future__ import annotations

from sqlalchemy import Connection, select
from sqlalchemy.orm import Session

from qbatch.models_db.tables import DatabaseIdentity

_ID = select(DatabaseIdentity.id)


def database_id(session: Session) -> str:
    """A UUID, made by the migration that made its table."""
    return session.scalars(_ID).one()


def take_turns(session: Session) -> None:
    """Wait until no other transaction is open that has called this. SQLite has one writer at a time anyway."""
    session.execute(_ID.with_for_update())


def find_database_id(connection: Connection) -> str | None:
    """The id of the database; None if somebody has deleted it."""
    return connection.execute(_ID).scalar()
