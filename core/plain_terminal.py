"""What a terminal shows in place of characters that its encoding does not have."""

from __future__ import annotations

import codecs
import io
from typing import Any

_NAME = "qbatch-plain"
# What tables and messages of ours contain. Of other characters, such as those of a model's name, the code is shown.
_PLAIN = {
    "–": "-", "—": "-", "−": "-", "─": "-", "━": "=", "│": "|", "├": "+", "└": "+", "…": "...", "→": "->", "×": "x",
    "·": "*", "±": "+/-", "≈": "~", "≤": "<=", "≥": ">=", "√": "sqrt ", "²": "^2", "⁵": "^5", "¹": "^1", "Δ": "d",
    "Σ": "sum ", "‖": "||", "✓": ">", "†": "^", "µ": "u", "μ": "u", "°": " deg", "ρ": "rho",
}  # fmt: skip


def show_anything(*streams: Any) -> None:
    """Let the text ``streams`` write any text, whatever their encoding is: no message ends in a UnicodeEncodeError."""
    codecs.register_error(_NAME, _plain)
    for stream in streams:
        # stdout has no such method where a test or a program has replaced it by its own.
        if isinstance(stream, io.TextIOWrapper) and not _is_unicode(stream.encoding):
            stream.reconfigure(errors=_NAME)


def _is_unicode(encoding: str) -> bool:
    return codecs.lookup(encoding).name.startswith("utf")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = "".join(_PLAIN.get(character) or _code(character) for character in error.object[error.start : error.end])
    return shown, error.end


def _code(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode("ascii")
