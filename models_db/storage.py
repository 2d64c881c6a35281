"""What everyone knows of the shared storage: where a published checkpoint is told from a folder. No SQLAlchemy."""

from __future__ import annotations

import json
from pathlib import Path

MANIFEST = "qbatch.json"
BASE_OUTPUTS = "base-logits"
"""What the baselines said, for the quantized models to be compared with: of every database that shares the storage."""


def is_in_place(storage: Path, path: str | None) -> bool:
    """Whether the checkpoint at ``path`` of the storage is still there, as far as its manifest and its files' sizes
    tell: whether their contents are, only reading them would. A baseline has none to miss."""
    if path is None:
        return True
    folder = storage / path
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        return all((folder / file["name"]).stat().st_size == file["size"] for file in files)
    except (OSError, ValueError, LookupError, TypeError):
        return False
