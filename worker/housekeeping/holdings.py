"""What the storage holds: every checkpoint with the batches that refer to it, and everything else by its kind."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from qbatch.core.domain import format_batch_id
from qbatch.core.manifest import Manifest
from qbatch.core.settings import Settings
from qbatch.core.storage import ADOPTED, BASE_OUTPUTS, CHECKPOINTS, broken_link
from qbatch.models_db.checkpoint_needs import CheckpointUser, users_of
from qbatch.models_db.checkpoints import all_checkpoints
from qbatch.models_db.database_id import database_id
from qbatch.models_db.session import Database
from qbatch.worker.checkpoints.ownership import why_not_ours
from qbatch.worker.housekeeping.stale_files import MOVED_ASIDE, REJECTED, size_of


class HoldingKind(StrEnum):
    """What a thing on the storage is, and what may become of it.

    CHECKPOINT: recorded, or of a job. UNREFERENCED: nobody knows of it, and this database may remove it. UNKNOWN: this
    database does not know of it, and may not remove it. HALF_REMOVED: its removal has begun.
    """

    CHECKPOINT = "checkpoints"
    UNREFERENCED = "unreferenced checkpoints"
    UNKNOWN = "checkpoints of other databases"
    REJECTED = "rejected checkpoints"
    HALF_REMOVED = "half-removed checkpoints"
    STAGING = "staging"
    BASE_OUTPUTS = "base outputs"
    LOGS = "logs"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A checkpoint, or everything of a kind below ``path``, which is relative to the storage.

    ``key``, ``model``, ``scheme`` and ``batch_ids`` are None or empty where they are not known. ``note``: what is
    particular about it.
    """

    kind: HoldingKind
    path: str
    size_bytes: int
    key: str | None = None
    model: str | None = None
    scheme: str | None = None
    batch_ids: tuple[int, ...] = ()
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind.value,
            "path": self.path,
            "bytes": self.size_bytes,
            "model": self.model,
            "scheme": self.scheme,
            "batches": [format_batch_id(batch_id) for batch_id in self.batch_ids],
            "note": self.note,
        }


def find_holdings(database: Database, settings: Settings) -> list[Holding]:
    """Everything on the storage. What vanishes meanwhile is left out. Raises DatabaseUnreachable, OSError."""
    with database.read() as session:
        keys = {row.path: row.key for row in all_checkpoints(session)}
        users = users_of(session)
        own = database_id(session)
    storage = settings.storage
    found = [*_checkpoints(storage, keys, users, own)]
    for kind, name in (
        (HoldingKind.STAGING, settings.staging.name),
        (HoldingKind.BASE_OUTPUTS, BASE_OUTPUTS),
        (HoldingKind.LOGS, settings.logs.name),
    ):
        found += _kind(kind, storage, name, own)
    known = {CHECKPOINTS, settings.staging.name, BASE_OUTPUTS, settings.logs.name, ADOPTED}
    others = [path for path in _entries(storage) if path.name not in known]
    return [*found, *(Holding(kind=HoldingKind.OTHER, path=path.name, size_bytes=_size(path)) for path in others)]


def _kind(kind: HoldingKind, storage: Path, name: str, own: str) -> Iterator[Holding]:
    """What there is of this kind: an entry for each database. Base outputs are not kept by database."""
    parts = [storage / name] if kind is HoldingKind.BASE_OUTPUTS else _entries(storage / name)
    for part in parts:
        if part.exists():
            path = str(part.relative_to(storage))
            note = "of another database" if kind is not HoldingKind.BASE_OUTPUTS and part.name != own else None
            yield Holding(kind=kind, path=path, size_bytes=_size(part), note=note if part.is_dir() else None)


def _checkpoints(
    storage: Path, keys: Mapping[str, str], users: Mapping[str, Sequence[CheckpointUser]], own: str
) -> Iterator[Holding]:
    for model in _entries(storage / CHECKPOINTS):
        if (elsewhere := broken_link(model)) is not None:
            note = f"a link to {elsewhere}, which is not there"
            path = str(model.relative_to(storage))
            yield Holding(kind=HoldingKind.OTHER, path=path, size_bytes=_size(model), model=model.name, note=note)
        for folder in _entries(model):
            path = str(folder.relative_to(storage))
            with suppress(FileNotFoundError):
                yield _checkpoint(storage, path, keys.get(path), users, own)


def _checkpoint(
    storage: Path, path: str, key: str | None, users: Mapping[str, Sequence[CheckpointUser]], own: str
) -> Holding:
    folder = storage / path
    size_bytes = size_of(folder)
    scheme, model = folder.name.rpartition("-")[0] or None, folder.parent.name
    if MOVED_ASIDE.fullmatch(folder.name):
        return Holding(kind=HoldingKind.HALF_REMOVED, path=path, size_bytes=size_bytes)
    if REJECTED.fullmatch(folder.name):
        return Holding(kind=HoldingKind.REJECTED, path=path, size_bytes=size_bytes, model=model)
    manifest = Manifest.read(folder) if folder.is_dir() else None
    used_by = users.get(key or (manifest.key if manifest is not None else ""), ())
    if key is not None or used_by:
        return Holding(
            kind=HoldingKind.CHECKPOINT,
            path=path,
            size_bytes=size_bytes,
            key=key or (manifest.key if manifest is not None else None),
            model=", ".join(dict.fromkeys(user.model for user in used_by)) or model,
            scheme=used_by[0].method if used_by else scheme,
            batch_ids=tuple(dict.fromkeys(user.batch_id for user in used_by)),
            note=None if used_by else "no job refers to it: its batch was removed",
        )
    why = why_not_ours(storage, path, own) or (None if manifest is not None else "it has no manifest")
    return Holding(
        kind=HoldingKind.UNREFERENCED if why is None else HoldingKind.UNKNOWN,
        path=path,
        size_bytes=size_bytes,
        key=manifest.key if manifest is not None else None,
        model=model,
        scheme=scheme,
        note=why,
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(path: Path) -> int:
    """The bytes of a file, or of what is in a folder at this moment."""
    if path.is_symlink() or not path.is_dir():
        with suppress(FileNotFoundError):
            return path.lstat().st_size
        return 0
    return sum(_size(entry) for entry in _entries(path))


def grouped(holdings: Iterable[Holding], by: str) -> list[dict[str, Any]]:
    """The number and bytes for each kind, batch, model or scheme; ``by`` path: each thing alone.

    A checkpoint of several batches counts in each. What is no checkpoint of a batch stands under its kind.
    """
    if by == "path":
        return [holding.to_json() for holding in holdings]
    rows: dict[tuple[str, str | None], dict[str, Any]] = {}
    for holding in holdings:
        for name in _names(holding, by):
            row = rows.setdefault((holding.kind, name), _empty(holding.kind, by, name))
            row["number"] += 1
            row["bytes"] += holding.size_bytes
    return list(rows.values())


def _empty(kind: HoldingKind, by: str, name: str | None) -> dict[str, Any]:
    return {"kind": kind.value, **({} if by == "kind" else {by: name}), "number": 0, "bytes": 0}


def _names(holding: Holding, by: str) -> Sequence[str | None]:
    if by == "kind":
        return (holding.kind,)
    if by == "batch":
        return [format_batch_id(batch_id) for batch_id in holding.batch_ids] or [None]
    return (holding.model if by == "model" else holding.scheme,)


def age_s(path: Path) -> float:
    """For how long a checkpoint has been as it is, by its manifest. Raises OSError."""
    return time.time() - (path / "qbatch.json").stat().st_mtime
