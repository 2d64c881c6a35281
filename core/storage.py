"""What everyone knows of the shared storage: whether a published checkpoint is what was published. No SQLAlchemy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

from qbatch.core.file_stat import Mounts, stat_file
from qbatch.core.manifest import MANIFEST, Manifest
from qbatch.core.sources import DOCUMENTS

CARD = "README.md"
"""A checkpoint's card is its owners' to edit: it is neither in its manifest nor part of a model."""
BASE_OUTPUTS = "base-logits"
"""What the baselines said, for the quantized models to be compared with: of every database that shares the storage."""


class Standing(StrEnum):
    """SOUND: every file is in the state in which its content was verified. DOUBTFUL: only reading them would tell."""

    SOUND = "sound"
    DOUBTFUL = "doubtful"
    GONE = "gone"


def standing(storage: Path, path: str, versions: Mapping[str, str] | None) -> Standing:
    """How the checkpoint at ``path`` of the storage stands. ``versions`` are its files' states (``FileStat.version``)
    when they were verified; None where that is unknown or too long ago."""
    folder = storage / path
    mounts = Mounts()
    try:
        manifest = Manifest.read(folder)
        if manifest is None:
            return Standing.GONE
        stats = {name: stat_file(folder / name, mounts) for name in manifest.names}
        has_strangers = bool(strangers(folder, manifest.names))
    except OSError:
        return Standing.GONE
    if any(stats[file.name].size != file.size for file in manifest.files):
        return Standing.GONE
    now = {name: stat.version for name, stat in stats.items()}
    return Standing.SOUND if versions == now and not has_strangers else Standing.DOUBTFUL


def strangers(folder: Path, published: Iterable[str]) -> list[str]:
    """Files that were not published, and may change what is loaded: an adapter, another tokenizer, more weights.

    Raises OSError.
    """
    known = {MANIFEST, CARD, *published}
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if str(path) not in known and not _is_harmless(path))


def _is_harmless(path: Path) -> bool:
    """Documents, and what hides: a file system's own files, and those that others are still writing."""
    is_document = any(fnmatchcase(path.name, pattern) for pattern in DOCUMENTS)
    return is_document or any(part.startswith(".") or part == "__pycache__" for part in path.parts)
