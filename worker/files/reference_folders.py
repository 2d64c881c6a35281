"""The folders of stored references: used when, how large, taken away whole. Importing it does not import torch."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

DESCRIPTION = "reference.json"
"""Written last, and touched by whoever opens the reference."""

IN_USE_S = 3600.0
"""A folder used this recently may have a reader, who opens its files one by one."""

# A folder on its way in or out, which nobody opens, is done with in less.
_LITTER_S = 3600.0


def occupants(root: Path) -> Iterator[tuple[float, Path, int]]:
    """(time of last use, folder, bytes) of each reference in ``root`` that does not vanish meanwhile."""
    for description in root.glob(f"[!.]*/{DESCRIPTION}"):
        with suppress(FileNotFoundError):
            size = sum(file.stat().st_size for file in description.parent.iterdir())
            yield description.stat().st_mtime, description.parent, size


def remove(folder: Path) -> None:
    """Take a reference away, whole at once. Raises OSError."""
    doomed = beside(folder)
    with suppress(FileNotFoundError):  # another worker removes it too
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_unused(folder: Path, since_s: float) -> bool:
    """The same, unless it was used after ``since_s``; whether we took it. Raises OSError."""
    doomed = beside(folder)
    with suppress(FileNotFoundError):  # a worker that makes room is at it too
        folder.rename(doomed)
        if (doomed / DESCRIPTION).stat().st_mtime <= since_s:
            shutil.rmtree(doomed)
            return True
        # Somebody opened it at the last moment.
        doomed.rename(folder)
    return False


def beside(folder: Path) -> Path:
    """A name for a folder on its way in or out."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


def litter(root: Path) -> Iterator[Path]:
    """The folders of ``beside`` that nobody has touched for long."""
    for folder in root.glob(".*.????????"):
        with suppress(FileNotFoundError):
            if folder.is_dir() and time.time() - folder.stat().st_mtime > _LITTER_S:
                yield folder
