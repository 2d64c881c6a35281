"""The parts of a measurement, which ``--measure`` chooses."""

from __future__ import annotations

from enum import StrEnum


class MeasuredPart(StrEnum):
    """A part of a measurement. SIZE is always known: it is counted, and nothing runs for it."""

    SIZE = "size"
    QUALITY = "quality"
    SPEED = "speed"
    WHY = "why"
    ENERGY = "energy"


def why_not_requested(part: MeasuredPart) -> str:
    """Why a part is missing from a measurement whose protocol leaves it out."""
    return f"it was not asked for (--measure {part})"
