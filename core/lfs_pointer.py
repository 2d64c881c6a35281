"""Files that a clone of a repository without Git LFS has in place of large ones."""

from __future__ import annotations

from pathlib import Path

from qbatch.core.errors import SourceCorrupt

_PREFIX = b"version https://git-lfs"
_MAX_BYTES = 1024


def refuse_lfs_pointer(path: Path) -> None:
    """Raise SourceCorrupt if the file only names the content that it stands for. Raises OSError."""
    if path.stat().st_size > _MAX_BYTES:
        return
    with path.open("rb") as file:
        if file.read(len(_PREFIX)) == _PREFIX:
            raise SourceCorrupt(
                f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}"
            )
