"""Checkpoint keys of skip lists as they were spelt, so that ``submit`` knows what a worker has found out.

What the names and patterns of a list mean for a model only a worker can tell (docs/identity.md). The key is then kept
under the one that the list has as it is spelt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import NO_SYNC, in_chunks, insert_into
from qbatch.models_db.tables import SkipListKey


def known(session: Session, spelled: Iterable[str]) -> dict[str, str]:
    """The keys of those that a worker has settled."""
    found: dict[str, str] = {}
    for chunk in in_chunks(sorted(set(spelled))):
        rows = session.execute(select(SkipListKey.spelled, SkipListKey.key).where(SkipListKey.spelled.in_(chunk)))
        found |= {row.spelled: row.key for row in rows}
    return found


def remember(session: Session, keys: Mapping[str, str]) -> None:
    for spelled, key in sorted(keys.items()):
        state = {"key": key, "settled_at": db_now()}
        session.execute(
            insert_into(session, SkipListKey)
            .values(spelled=spelled, **state)
            .on_conflict_do_update(index_elements=[SkipListKey.spelled], set_=state)
        )


def forget(session: Session, older_than_s: float) -> None:
    """Delete those that no worker has settled since: it will do so again when they are next asked for."""
    session.execute(
        delete(SkipListKey).where(SkipListKey.settled_at < db_now(-older_than_s)), execution_options=NO_SYNC
    )
