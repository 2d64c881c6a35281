"""Escape characters that would control a terminal in text of unknown origin, and detect invalid Unicode."""

from __future__ import annotations

import re
from collections.abc import Mapping

# DEL and the C1 controls (\x9b can begin an escape sequence too), line separators, and marks of writing direction.
_ABOVE_ASCII = "\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_ANY = re.compile(f"[\x00-\x1f{_ABOVE_ASCII}]")
_EXCEPT_TAB_AND_NEWLINE = re.compile(f"[\x00-\x08\x0b-\x1f{_ABOVE_ASCII}]")
_UNESCAPED_IN_JSON = re.compile(f"[{_ABOVE_ASCII}]")
_SHORT: Mapping[str, str] = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escape_controls(text: str, *, in_lines: bool = False) -> str:
    r"""Replace control characters with Python escapes such as ``\x1b``. With ``in_lines``, keep newlines and tabs."""
    return (_EXCEPT_TAB_AND_NEWLINE if in_lines else _ANY).sub(lambda match: _escaped(match[0]), text)


def escape_controls_of_json(text: str) -> str:
    """Escape the control characters that JSON allows unescaped. The JSON document keeps its meaning."""
    return _UNESCAPED_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be encoded as UTF-8.

    It cannot if it contains a lone surrogate, which is how Python represents a byte that was not valid UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escaped(character: str) -> str:
    code = ord(character)
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
