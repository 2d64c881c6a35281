"""Which checkpoints are published, by key."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from models_db.tables import Checkpoint


def record(session: Session, *, key: str, path: str, root_sha256: str, disk_bytes: int, job_id: int) -> None:
    """Remember a published checkpoint; the newest word on a key stands."""
    row = session.get(Checkpoint, key)
    if row is None:
        session.add(Checkpoint(key=key, path=path, root_sha256=root_sha256, disk_bytes=disk_bytes, job_id=job_id))
        return
    row.path, row.root_sha256, row.disk_bytes = path, root_sha256, disk_bytes


def all_checkpoints(session: Session) -> Sequence[Checkpoint]:
    return session.scalars(select(Checkpoint).order_by(Checkpoint.path)).all()
