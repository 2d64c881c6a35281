"""A CPU that emulates 16-bit arithmetic, in words: a speed measured there is the emulation's, and not the model's."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.checks import Check, State, check
from qbatch.views.units import show_float

# In hardware 16 bits take no longer than 32: what takes half as long again is not noise.
LEAST_SLOWDOWN = 1.5


def emulation_remarks(rows: Sequence[ResultRow]) -> Iterable[str]:
    """A sentence for each device and dtype that rows computed in by emulation."""
    found: dict[tuple[str, str], list[tuple[ResultRow, float]]] = {}
    for row in rows:
        for dtype, slowdown in _emulated(row.details.arithmetic_slowdown or {}).items():
            found.setdefault((str(row.device_name), dtype), []).append((row, slowdown))
    for (device, dtype), measured in found.items():
        slowdown = statistics.median(slowdown for _, slowdown in measured)
        too = ", the baseline's too," if any(row.is_baseline for row, _ in measured) else ""
        yield (
            f"{device} emulates {dtype}: a matrix product takes {_times(slowdown)} as long there as in float32. The "
            f"speed of what computes in {dtype}{too} is the emulation's and not the model's."
        )


def arithmetic_check(slowdowns: Mapping[str, float]) -> Check:
    """``slowdowns``: how many times as long as in float32 a matrix product takes on this CPU, by dtype."""
    emulated = _emulated(slowdowns)
    said = [
        f"emulates {dtype}: a matrix product takes {_times(slowdown)} as long as in float32"
        for dtype, slowdown in emulated.items()
    ]
    if "bfloat16" not in emulated:
        said.insert(0, "computes in bfloat16 as fast as in float32")
        return check("cpu", State.OK, "; ".join(said))
    return check("cpu", State.NOTE, "; ".join([*said, "the speed of 16-bit models here is the emulation's"]))


def native_check(instructions: str) -> Check:
    """Where the processor says that it has ``instructions`` for bfloat16, nothing needs to be measured."""
    return check("cpu", State.OK, f"computes in bfloat16 by itself ({instructions}); --deep measures how fast")


def _emulated(slowdowns: Mapping[str, float]) -> dict[str, float]:
    return {dtype: slowdown for dtype, slowdown in slowdowns.items() if slowdown >= LEAST_SLOWDOWN}


def _times(slowdown: float) -> str:
    return f"{show_float(slowdown, 2)} times"
