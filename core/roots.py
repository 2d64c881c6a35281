"""Which folders a source may be in. Checked when it is submitted and again when a worker opens it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qbatch.core.errors import UnsafeSource


def refuse_outside_roots(folder: Path, roots: Sequence[Path] | None) -> None:
    """Raise UnsafeSource unless ``folder``, and everything that links in it point to, is in one of ``roots``.

    None allows any folder. A folder that does not exist is judged by its path.
    """
    if roots is None:
        return
    if not roots:
        raise UnsafeSource(
            "folders are refused because the broker is on another machine and QBATCH_MODEL_ROOTS is not set"
        )
    allowed = [Path(os.path.realpath(root)) for root in roots]
    if not _is_in(folder, allowed):
        raise UnsafeSource(f"{folder} is not in a folder of QBATCH_MODEL_ROOTS ({', '.join(map(str, roots))})")
    for link in _links(folder):
        if not _is_in(link, allowed):
            raise UnsafeSource(f"{link} is a link to a place outside the folders of QBATCH_MODEL_ROOTS")


def _is_in(path: Path, roots: Sequence[Path]) -> bool:
    place = Path(os.path.realpath(path))
    return any(place.is_relative_to(root) for root in roots)


def _links(folder: Path) -> Iterator[Path]:
    """Every symbolic link below ``folder``, and below the folders that those links point to.

    Links are followed because copying the files of a model follows them too. A link is yielded before the folder
    that it points to is searched.
    """
    searched = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(at)
        if place in searched:
            folders.clear()
            continue
        searched.add(place)
        for name in (*folders, *files):
            path = Path(at, name)
            if path.is_symlink():
                yield path
