"""The exponential function, which a float may be too small for."""

from __future__ import annotations

import math

_LARGEST_EXPONENT = 709.0


def exponential(exponent: float) -> float:
    """e to the power of ``exponent``; infinity instead of an OverflowError."""
    return math.exp(exponent) if exponent < _LARGEST_EXPONENT else math.inf
