"""What a database is called among others that share a storage. A copy of it brings the name along."""

from __future__ import annotations

import uuid

from sqlalchemy import select
from sqlalchemy.orm import Session

from models_db.session import insert_into
from models_db.tables import DatabaseId

_ROW = 1


def known_id(session: Session) -> str | None:
    """None where no worker has asked for one yet."""
    return session.scalars(select(DatabaseId.value).where(DatabaseId.id == _ROW)).one_or_none()


def database_id(session: Session) -> str:
    """32 hexadecimal digits, made when they are first asked for. Of several that ask at once, all get the same."""
    found = known_id(session)
    if found is not None:
        return found
    session.execute(insert_into(session, DatabaseId).values(id=_ROW, value=uuid.uuid4().hex).on_conflict_do_nothing())
    made = known_id(session)
    assert made is not None  # noqa: S101  (it was inserted, by us or by others)
    return made
