"""Whose a checkpoint is. Several databases may share a storage, and none can ask another one what it needs.

The manifest names the database whose job wrote the checkpoint. Another database that uses it leaves a mark, an empty
file, before it reads the checkpoint's files: .adopted/<database>/<path below the storage>. So whoever wants to remove a
checkpoint moves it aside first and looks for marks second. Either the mark is seen, or the files are not found.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

from qbatch.core.manifest import Manifest
from qbatch.core.storage import ADOPTED

# The folders in which each database has a folder of its own, named by its id.
_FOLDERS_OF_DATABASES = ("logs", ".staging", ADOPTED)


def mark_adopted(storage: Path, path: str, manifest: Manifest, database: str | None) -> None:
    """Note that ``database`` is going to use the checkpoint at ``path``, unless it wrote it. Raises OSError.

    Only whoever then finds the checkpoint's files has it.
    """
    if database is None or manifest.database == database:
        return
    mark = _mark(storage, path, database)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def remove_mark(storage: Path, path: str, database: str) -> None:
    """Note that ``database`` does not use the checkpoint any more. Raises OSError."""
    mark = _mark(storage, path, database)
    if mark.exists():
        mark.unlink(missing_ok=True)


def own_marks(storage: Path, database: str) -> Iterator[tuple[str, Path]]:
    """The checkpoints that ``database`` has marked as used, each with its mark. Raises OSError."""
    folder = storage / ADOPTED / database
    for mark in sorted(folder.rglob("*")):
        if not mark.is_dir():
            yield str(mark.relative_to(folder)), mark


def adopters(storage: Path, path: str, own: str) -> list[str]:
    """The other databases that use the checkpoint at ``path`` without having written it. Raises OSError."""
    return [other for other in _names(storage / ADOPTED, own) if _mark(storage, path, other).exists()]


def other_databases(storage: Path, own: str) -> list[str]:
    """All other databases that have left something on this storage. Raises OSError."""
    return sorted({name for folder in _FOLDERS_OF_DATABASES for name in _names(storage / folder, own)})


def why_not_ours(storage: Path, path: str, own: str, *, folder: Path | None = None) -> str | None:
    """Why the database ``own`` must not remove the checkpoint at ``path``, in words; None if it may. Raises OSError.

    ``folder`` is where it is now, if that is another place.
    """
    if others := adopters(storage, path, own):
        return f"the database {others[0]} on this storage uses it too"
    try:
        manifest = Manifest.read(folder or storage / path)
    except NotADirectoryError:
        manifest = None
    maker = manifest.database if manifest is not None else None
    if maker is not None:
        return None if maker == own else f"the database {maker} made it"
    others = other_databases(storage, own)
    return f"it does not say which database made it, and {others[0]} uses this storage too" if others else None


def _mark(storage: Path, path: str, database: str) -> Path:
    return storage / ADOPTED / database / path


def _names(folder: Path, own: str) -> Iterator[str]:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return iter(())
    return (name for name in names if name != own and _is_id(name))


def _is_id(name: str) -> bool:
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False
