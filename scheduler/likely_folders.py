"""Folders that a mistyped name most likely means."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

# How alike two names must be, by difflib's measure: one letter too few, too many or wrong in a name of four.
_ALIKE = 0.75
_NUMBER = re.compile(r"[0-9]+")


class LikelyFolders:
    """Looks each folder through once, since a list may name thousands of models of one organisation."""

    def __init__(self) -> None:
        self._entries: dict[str, Sequence[str]] = {}

    def near(self, name: str) -> str | None:
        """A folder with a model whose path is spelt much like ``name``, which is no folder; None if there is none."""
        parent, slash, last = name.rstrip("/").rpartition("/")
        entries = self._names_in(parent or slash or ".")
        if not entries:
            return None
        from difflib import get_close_matches

        # Versions and sizes are meant as they are written.
        alike = [
            entry
            for entry in get_close_matches(last, entries, cutoff=_ALIKE)
            if _NUMBER.findall(entry) == _NUMBER.findall(last)
        ]
        paths = (f"{parent}{slash}{entry}" for entry in alike)
        return next((path for path in paths if (Path(path) / "config.json").is_file()), None)

    def _names_in(self, folder: str) -> Sequence[str]:
        if folder not in self._entries:
            self._entries[folder] = _names_in(folder)
        return self._entries[folder]


def _names_in(folder: str) -> Sequence[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:  # there is no such folder, or it cannot be read: nothing there could be meant
        return []
