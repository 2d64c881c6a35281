"""Characters that strangers' names and messages may hold: those that steer a terminal, and those that are none."""

from __future__ import annotations

import re
from collections.abc import Mapping

# DEL and C1 (an escape sequence may begin with \x9b too), separators of lines, and what turns the direction of writing.
_LATER = "\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_ANY = re.compile(f"[\x00-\x1f{_LATER}]")
_BUT_LINES = re.compile(f"[\x00-\x08\x0b-\x1f{_LATER}]")
_NOT_IN_JSON = re.compile(f"[{_LATER}]")
_SHORT: Mapping[str, str] = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escape_controls(text: str, *, in_lines: bool = False) -> str:
    """``text`` with each such character as Python would write it. With ``in_lines``, newlines and tabs stay."""
    return (_BUT_LINES if in_lines else _ANY).sub(lambda match: _escaped(match[0]), text)


def escape_controls_of_json(text: str) -> str:
    """JSON ``text`` of the same meaning without those that JSON leaves as they are."""
    return _NOT_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: it has no half of a surrogate pair, which stands for a byte that is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escaped(character: str) -> str:
    code = ord(character)
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
