"""What a database is called, among others that share its storage or take its place. A copy brings the name along."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.models_db.tables import DatabaseIdentity


def database_id(session: Session) -> str:
    """A UUID, made by the migration that made its table."""
    return session.scalars(select(DatabaseIdentity.id)).one()
