"""Screens that are compared with what they were, character by character.

``REWRITE_SCREENS=1`` in the environment writes them anew: only where a change of what is shown is meant.
"""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = Path(__file__).parent / "golden"


def check_screen(name: str, shown: str) -> None:
    """Compare ``shown`` with the golden screen of this name."""
    path = _FOLDER / f"{name}.txt"
    if os.environ.get("REWRITE_SCREENS"):
        path.write_text(shown + "\n", encoding="utf-8")
    assert shown + "\n" == path.read_text(encoding="utf-8")
