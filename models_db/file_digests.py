"""The checksums of files that were hashed, valid while the file system reports the same state of the file.

They are stored per host, because the same path may lead to different files on different hosts.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from qbatch.core.digest import Checksums
from qbatch.core.file_stat import FileStat
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import NO_SYNC, in_chunks, insert_into
from qbatch.models_db.tables import FileDigestRow


def known(session: Session, stats: Iterable[FileStat]) -> dict[FileStat, Checksums]:
    """The checksums of the files that this host has hashed in exactly this state."""
    by_place = {_place(stat): stat for stat in stats}
    found: dict[FileStat, Checksums] = {}
    for chunk in in_chunks(list(by_place)):
        rows = session.scalars(select(FileDigestRow).where(FileDigestRow.place.in_(chunk)))
        for row in rows:
            stat = by_place[row.place]
            if row.version == _version(stat):
                found[stat] = Checksums(chunk_sha256=tuple(row.chunk_sha256), sha256=row.sha256)
    return found


def remember(session: Session, digests: Mapping[FileStat, Checksums]) -> None:
    """Store the checksums of files of this host, replacing older ones of the same file."""
    rows: Sequence[tuple[str, FileStat]] = sorted((_place(stat), stat) for stat in digests)
    for place, stat in rows:
        state = {
            "version": _version(stat),
            "chunk_sha256": list(digests[stat].chunk_sha256),
            "sha256": digests[stat].sha256,
            "hashed_at": db_now(),
        }
        session.execute(
            insert_into(session, FileDigestRow)
            .values(place=place, host=socket.gethostname(), path=stat.path.encode(errors="replace").decode(), **state)
            .on_conflict_do_update(index_elements=[FileDigestRow.place], set_=state)
        )


def hashed_before(session: Session, older_than_s: float) -> list[str]:
    """The places of files that were last hashed longer than ``older_than_s`` ago, by the database's clock."""
    return list(session.scalars(select(FileDigestRow.place).where(FileDigestRow.hashed_at < db_now(-older_than_s))))


def forget(session: Session, places: Collection[str], older_than_s: float) -> int:
    """Delete the checksums of ``places`` that were not hashed again meanwhile. Returns how many were deleted."""
    is_old = FileDigestRow.hashed_at < db_now(-older_than_s)
    gone = session.scalars(
        delete(FileDigestRow).where(FileDigestRow.place.in_(places), is_old).returning(FileDigestRow.place),
        execution_options=NO_SYNC,
    )
    return len(gone.all())


def _place(stat: FileStat) -> str:
    """A hash of host, mount and path, because a path may be too long for an index."""
    label = stat.mount.label if stat.mount is not None else ""
    place = "\0".join((socket.gethostname(), label, stat.path))
    return hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()


def _version(stat: FileStat) -> str:
    return f"{stat.device}:{stat.version}"
