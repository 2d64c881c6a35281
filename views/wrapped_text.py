"""Text in lines that fit a terminal."""

from __future__ import annotations

import re
import textwrap

from qbatch.views.formats import UNLIMITED

_BEFORE_UNIT = re.compile(r"(?<=[0-9]) (?=%|(?:[KMG]iB|ms|s|min|h|nats)\b|(?:tok|samples)/s)")
_NO_BREAK = "\N{NO-BREAK SPACE}"


def wrap(text: str, width: int, *, first: str = "", indent: str = "") -> list[str]:
    """``text`` in lines of ``width``, none of which ends between a number and its unit."""
    if width >= UNLIMITED:
        return [first + text]
    whole = _BEFORE_UNIT.sub(_NO_BREAK, text)
    # A label that fills the line leaves the text a line of its own.
    lines = textwrap.wrap(whole, max(width, 40), initial_indent=first, subsequent_indent=indent) or [first]
    return [line.replace(_NO_BREAK, " ") for line in lines]
