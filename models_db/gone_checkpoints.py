"""Notice which recorded checkpoints somebody has removed from the storage, and which are back."""

from __future__ import annotations

from pathlib import Path

from qbatch.core.storage import CHECKPOINTS, missing_checkpoints, present_checkpoints
from qbatch.models_db.checkpoints import all_checkpoints, checkpoints_at, note_presence
from qbatch.models_db.session import Database, in_chunks
from qbatch.models_db.write_lock import pausing_afterwards

# For so many, folders are listed within a transaction: on SQLite everybody who writes waits for its end.
_AT_ONCE = 20


def find_missing(database: Database, storage: Path) -> set[str]:
    """The paths of the checkpoints that have no folder, though nobody has recorded that yet."""
    with database.read() as session:
        there = {row.path for row in all_checkpoints(session) if row.gone_at is None}
    return missing_checkpoints(storage, there)


def note_missing(database: Database, storage: Path) -> set[str]:
    """Record which checkpoints are gone, and which are no longer. Returns the paths of the former.

    Does nothing where this machine does not see the storage. What a submit or a removal holds is left for the next
    time. Raises DatabaseUnreachable.
    """
    missing = find_missing(database, storage)
    with database.read() as session:
        gone = {row.path for row in all_checkpoints(session) if row.gone_at is not None}
    back = present_checkpoints(storage, gone)
    if not (storage / CHECKPOINTS).is_dir():
        return set()
    noted: set[str] = set()
    for paths in in_chunks(sorted(missing | back), _AT_ONCE):
        with pausing_afterwards(), database.write() as session:
            # Looked at again while their records are locked: a worker publishes first and records second.
            free = {row.path for row in checkpoints_at(session, paths, lock=True, skip_locked=True)}
            gone_now = missing_checkpoints(storage, free & missing)
            note_presence(session, gone=gone_now, present=present_checkpoints(storage, free & back))
        noted |= gone_now
    return noted
