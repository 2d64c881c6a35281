"""What everyone knows of the shared storage: where a published checkpoint is told from a folder. No SQLAlchemy."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "qbatch.json"


def is_in_place(storage: Path, path: str | None) -> bool:
    """Whether the checkpoint at ``path`` of the storage is still there; a baseline has none to miss."""
    return path is None or (storage / path / MANIFEST).is_file()
