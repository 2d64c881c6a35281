"""Folders that a mistyped name most likely means."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

# How alike two names must be, by difflib's measure: one letter too few, too many or wrong in a name of four.
_ALIKE = 0.75
# How alike two words of a name must be: "lama" and "mien" are mistyped, "en" is not a mistyped "de", nor "cased" a
# mistyped "uncased".
_ALIKE_WORDS, _LETTERS_APART = 0.6, 1
_NUMBER, _BETWEEN_WORDS = re.compile(r"[0-9]+"), re.compile(r"[-_.]")


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

        alike = [entry for entry in get_close_matches(last, entries, cutoff=_ALIKE) if _is_mistyped(last, entry)]
        paths = (f"{parent}{slash}{entry}" for entry in alike)
        return next((path for path in paths if (Path(path) / "config.json").is_file()), None)

    def _names_in(self, folder: str) -> Sequence[str]:
        if folder not in self._entries:
            self._entries[folder] = _names_in(folder)
        return self._entries[folder]


def _is_mistyped(name: str, entry: str) -> bool:
    """Whether single letters differ. Versions, sizes and whole words, which tell models of a family apart, are meant as
    they are written."""
    from difflib import SequenceMatcher

    words, others = _BETWEEN_WORDS.split(name), _BETWEEN_WORDS.split(entry)
    return (
        _NUMBER.findall(entry) == _NUMBER.findall(name)
        and len(words) == len(others)
        and all(
            abs(len(word) - len(other)) <= _LETTERS_APART and SequenceMatcher(None, word, other).ratio() >= _ALIKE_WORDS
            for word, other in zip(words, others, strict=True)
        )
    )


def _names_in(folder: str) -> Sequence[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:  # there is no such folder, or it cannot be read: nothing there could be meant
        return []
