"""One unit for all figures of a column, so that their numbers line up and the heading alone says what they are in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qbatch.core.byte_units import GIB, KIB, MIB
from qbatch.core.measured.metric import Unit
from qbatch.views.metric_text import show_value
from qbatch.views.units import show_float, show_nats

_BYTE_UNITS = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnUnit:
    """``label`` stands in the heading; "" where a figure needs no unit, or says its own."""

    label: str
    show: Callable[[float], str]


def column_unit(unit: Unit, values: Sequence[float]) -> ColumnUnit:
    """The unit of a column with these ``values``, of which some may be infinite or NaN."""
    sizes = [abs(value) for value in values if math.isfinite(value)]
    match unit:
        case Unit.BYTES:
            return _scaled(*_byte_unit(sizes), sizes)
        case Unit.SECONDS:
            is_long = max(sizes, default=0.0) >= 10
            return _scaled(1.0, "s", sizes) if is_long else _scaled(1e-3, "ms", sizes)
        case Unit.TOKENS_PER_S | Unit.SAMPLES_PER_S:
            return _scaled(1.0, "tok/s" if unit is Unit.TOKENS_PER_S else "sample/s", sizes)
        case Unit.SHARE:
            return ColumnUnit(label="%", show=lambda value: f"{value * 100:.1f}")
        case Unit.NATS:
            return ColumnUnit(label="nats", show=show_nats)
        case Unit.JOULES:
            return ColumnUnit(label="J", show=lambda value: show_float(value, 3))
        case _:
            return ColumnUnit(label="", show=lambda value: show_value(unit, value))


def _byte_unit(sizes: Sequence[float]) -> tuple[int, str]:
    """The largest unit in which the smallest value still has figures."""
    least, most = min(sizes, default=0.0), max(sizes, default=0.0)
    fitting = ((factor, label) for factor, label in _BYTE_UNITS if most >= factor and least >= factor / 20)
    return next(fitting, _BYTE_UNITS[-1])


def _scaled(factor: float, label: str, sizes: Sequence[float]) -> ColumnUnit:
    """A unit that shows the smallest size with three significant figures, and all others with as many decimals."""
    least = min((size for size in sizes if size > 0), default=factor) / factor
    decimals = min(3, max(0, 2 - math.floor(math.log10(least))))
    return ColumnUnit(label=label, show=lambda value: f"{value / factor:,.{decimals}f}")
