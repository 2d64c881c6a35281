"""What is asked of a comparison: light enough for every start of the command line."""

from __future__ import annotations

from dataclasses import dataclass

ORIENTATIONS = ("figure", "scheme")
PREFERENCES = ("size", "speed", "quality")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """What a configuration must keep to, and what is preferred among those that do. None: not bounded by the user."""

    prefer: str = "size"
    max_kl: float | None = None
    max_ppl_ratio: float | None = None
    max_weights_bytes: int | None = None
