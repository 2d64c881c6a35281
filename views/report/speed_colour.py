"""The colours by which a chart shows speed: from much slower than the baseline to much faster."""

from __future__ import annotations

from dataclasses import dataclass

from qbatch.views.noise import NOT_DISTINGUISHABLE
from qbatch.views.report.relative_speed import RelativeSpeed


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedColour:
    """``name``: its class in the page's style. ``hexadecimal``: the same for files; "" is hollow."""

    name: str
    hexadecimal: str
    text: str


# From brewer's red-blue scale, which people who see no red or no green can read.
_SLOWER = (
    (0.5, SpeedColour(name="slow-3", hexadecimal="#b2182b", text="under ×0.5 of the baseline's speed")),
    (0.8, SpeedColour(name="slow-2", hexadecimal="#e0724f", text="×0.5 to ×0.8")),
    (1.0, SpeedColour(name="slow-1", hexadecimal="#f6b99b", text="×0.8 to ×1")),
)
SAME = SpeedColour(name="same", hexadecimal="#9aa3ad", text=f"{NOT_DISTINGUISHABLE} from the baseline")
_FASTER = (
    (1.25, SpeedColour(name="fast-1", hexadecimal="#a6cfe4", text="×1 to ×1.25")),
    (2.0, SpeedColour(name="fast-2", hexadecimal="#4a98c9", text="×1.25 to ×2")),
)
_FASTEST = SpeedColour(name="fast-3", hexadecimal="#1c5f9e", text="×2 and over")
UNKNOWN = SpeedColour(name="unknown", hexadecimal="", text="not compared")
SCALE = (*(colour for _, colour in _SLOWER), SAME, *(colour for _, colour in _FASTER), _FASTEST, UNKNOWN)


def speed_colour(speed: RelativeSpeed | None) -> SpeedColour:
    if speed is None:
        return UNKNOWN
    if speed.is_same:
        return SAME
    return next((colour for limit, colour in (*_SLOWER, *_FASTER) if speed.factor < limit), _FASTEST)
