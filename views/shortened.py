"""Text made to fit into so many columns of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from qbatch.views.formats import text_width

LEAST_OF_A_NAME = 16
"""The fewest columns that a model's name gets, however narrow the terminal is."""
_ELLIPSIS = "…"


def cut(text: str, width: int) -> str:
    """``text`` without its end, if it is too wide."""
    return text if text_width(text) <= width else _beginning(text, width - 1) + _ELLIPSIS if width > 0 else ""


def shorten(text: str, width: int) -> str:
    """``text`` without its middle, if it is too wide: names of models differ at their ends."""
    if text_width(text) <= width:
        return text
    if width < 4:
        return cut(text, width)
    end = _beginning(text[::-1], (width - 1) * 2 // 3)[::-1]
    return _beginning(text, width - 1 - text_width(end)) + _ELLIPSIS + end


def fit_names(names: Sequence[str], width: int) -> list[str]:
    """Models' names in at most ``width`` columns: whole if all fit, else without the owner or the folder where that
    tells them apart, and without their middle."""
    if max(map(text_width, names), default=0) <= width:
        return list(names)
    return [shorten(name, width) for name in short_names(names)]


def short_names(whole: Sequence[str]) -> list[str]:
    """Models' names without the owner or the folder, where that tells them apart."""
    last = {name: name.rstrip("/").rpartition("/")[2] or name for name in whole}
    is_clear = len(set(last.values())) == len(last)
    return [last[name] if is_clear else name for name in whole]


def pad(text: str, width: int) -> str:
    return text + " " * (width - text_width(text))


def _beginning(text: str, width: int) -> str:
    taken = 0
    for number, character in enumerate(text):
        taken += text_width(character)
        if taken > width:
            return text[:number]
    return text
