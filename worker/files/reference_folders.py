"""The folders of stored baseline outputs: their last use, size and removal. Importing it does not import torch."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

DESCRIPTION = "reference.json"
"""Written last, so its presence means the folder is complete; touched each time the reference is opened."""

IN_USE_S = 3600.0
"""A folder used within this time may still have a reader, which opens its files one by one."""

# A folder that is being written or removed takes less time than this.
_ABANDONED_AFTER_S = 3600.0


def stored_references(root: Path) -> Iterator[tuple[float, Path, int]]:
    """Yield (time of last use, folder, bytes) of each reference in ``root``, skipping those that vanish meanwhile."""
    for description in root.glob(f"[!.]*/{DESCRIPTION}"):
        with suppress(FileNotFoundError):
            size = sum(file.stat().st_size for file in description.parent.iterdir())
            yield description.stat().st_mtime, description.parent, size


def remove(folder: Path) -> None:
    """Remove a reference atomically. Raises OSError."""
    temporary = temporary_name(folder)
    with suppress(FileNotFoundError):  # another worker removes it too
        folder.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def remove_unused(folder: Path, since_s: float) -> bool:
    """Remove a reference unless it was used after ``since_s``. Returns whether it was removed. Raises OSError."""
    temporary = temporary_name(folder)
    with suppress(FileNotFoundError):  # a worker that frees space removes it too
        folder.rename(temporary)
        if (temporary / DESCRIPTION).stat().st_mtime <= since_s:
            shutil.rmtree(temporary)
            return True
        # It was opened at the last moment.
        temporary.rename(folder)
    return False


def temporary_name(folder: Path) -> Path:
    """A temporary name for a folder that is being written or removed."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


def abandoned_folders(root: Path) -> Iterator[Path]:
    """The temporary folders (see ``temporary_name``) that have been left behind."""
    for folder in root.glob(".*.????????"):
        with suppress(FileNotFoundError):
            if folder.is_dir() and time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_S:
                yield folder
