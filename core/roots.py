"""Which folders a source may lie in. Checked where it is submitted, and again where it is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qbatch.core.errors import UnsafeSource


def check_place(folder: Path, roots: Sequence[Path] | None) -> None:
    """Raises UnsafeSource unless ``folder``, and whatever the links in it lead to, lies in one of ``roots``.

    None allows any place. A folder that does not exist is judged by where it would be.
    """
    if roots is None:
        return
    if not roots:
        raise UnsafeSource("folders are refused: the broker is on another machine, and QBATCH_MODEL_ROOTS is not set")
    allowed = [Path(os.path.realpath(root)) for root in roots]
    if not _is_in(folder, allowed):
        raise UnsafeSource(f"{folder} is not in a folder of QBATCH_MODEL_ROOTS")
    for link in _links(folder):
        if not _is_in(link, allowed):
            raise UnsafeSource(f"{link} leads out of the folders of QBATCH_MODEL_ROOTS")


def _is_in(path: Path, roots: Sequence[Path]) -> bool:
    place = Path(os.path.realpath(path))
    return any(place.is_relative_to(root) for root in roots)


def _links(folder: Path) -> Iterator[Path]:
    """Every symbolic link below ``folder``, and below the folders that those lead to: whoever copies what a pattern
    finds follows them too. A linked folder is searched only after its link was taken."""
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
