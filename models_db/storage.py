"""What everyone knows of the shared storage: whether a published checkpoint is what was published. No SQLAlchemy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from models_db.file_stat import Mounts, stat_file

MANIFEST = "qbatch.json"


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
        files = {file["name"]: file["size"] for file in json.loads((folder / MANIFEST).read_bytes())["files"]}
        stats = {name: stat_file(folder / name, mounts) for name in files}
    except (OSError, ValueError, LookupError, TypeError):
        return Standing.GONE
    if any(stats[name].size != size for name, size in files.items()):
        return Standing.GONE
    is_sound = versions is not None and versions == {name: stat.version for name, stat in stats.items()}
    return Standing.SOUND if is_sound else Standing.DOUBTFUL
