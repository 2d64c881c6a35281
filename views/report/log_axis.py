"""A logarithmic axis: where a value stands on it, and which values are marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.byte_units import GIB, KIB, MIB

_MARGIN = 1.25
_LEAST_SPAN = 4.0
_MOST_TICKS = 7
# The most decades, and what is marked in each.
_STEPS: tuple[tuple[float, tuple[float, ...]], ...] = (
    (1, (1, 1.5, 2, 3, 4, 5, 7)),
    (2, (1, 2, 3, 5)),
    (3, (1, 2, 5)),
    (math.inf, (1,)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogAxis:
    """From ``low``, drawn at ``start``, to ``high``, drawn at ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], *, start: float, end: float) -> LogAxis:
        """An axis that holds all ``values``, which are positive and finite, and spans at least a factor of four."""
        known = list(values)
        low, high = min(known) / _MARGIN, max(known) * _MARGIN
        missing = math.sqrt(max(1.0, _LEAST_SPAN / (high / low)))
        return cls(low=low / missing, high=high * missing, start=start, end=end)

    def position(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)

    def decimal_ticks(self) -> list[float]:
        """Round values within the axis: the longer it is, the fewer to a power of ten."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = next(steps for decades, steps in _STEPS if last - first <= decades)
        return self._thinned([step * 10.0**power for power in range(first, last + 1) for step in steps])

    def binary_ticks(self) -> list[float]:
        """Powers of two within the axis."""
        return self._thinned([2.0**power for power in range(math.floor(math.log2(self.low)), 64)])

    def _thinned(self, candidates: Sequence[float]) -> list[float]:
        inside = [value for value in candidates if self.low <= value <= self.high]
        return inside[:: math.ceil(len(inside) / _MOST_TICKS) or 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    position: float
    text: str


def ticks(axis: LogAxis, values: Iterable[float], show: Callable[[float], str]) -> list[Tick]:
    return [Tick(position=axis.position(value), text=show(value)) for value in values]


def show_round_bytes(value: float) -> str:
    """``512 MiB``: a power of two of bytes, without decimals."""
    factor, label = next(((f, u) for f, u in ((GIB, "GiB"), (MIB, "MiB")) if value >= f), (KIB, "KiB"))
    return f"{value / factor:g} {label}"
