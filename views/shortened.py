"""Text made to fit into so many columns of a terminal."""

from __future__ import annotations

from qbatch.views.formats import text_width

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


def pad(text: str, width: int) -> str:
    return text + " " * (width - text_width(text))


def _beginning(text: str, width: int) -> str:
    taken = 0
    for number, character in enumerate(text):
        taken += text_width(character)
        if taken > width:
            return text[:number]
    return text
