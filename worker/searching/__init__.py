"""Which layers of a model stay at 16 bits: how sensitive each group is, and the mixtures that follow."""

from __future__ import annotations

from pathlib import Path

DEFAULT_SEARCH_TEXT = Path(__file__).with_name("search_text.txt")
