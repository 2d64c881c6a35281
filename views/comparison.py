"""The options of a comparison. Importing this is cheap, since every command does."""

from __future__ import annotations

from dataclasses import dataclass

ORIENTATIONS = ("figure", "scheme")
PREFERENCES = ("size", "speed", "quality")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """The user's limits, and what to prefer among the configurations within them. None: no limit was given."""

    prefer: str = "size"
    max_kl: float | None = None
    max_ppl_ratio: float | None = None
    max_weights_bytes: int | None = None
    min_tokens_per_s: float | None = None
