"""Remarks on CPUs that emulate 16-bit arithmetic, where a measured speed is that of the emulation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.checks import Check, State, check
from qbatch.views.units import show_float

# In hardware, 16-bit arithmetic takes no longer than 32-bit; 1.5 times as long is more than noise.
LEAST_SLOWDOWN = 1.5


def emulation_remarks(rows: Sequence[ResultRow]) -> Iterable[str]:
    """Yield a sentence for each device and emulated dtype among ``rows``, with the median slowdown."""
    emulations: dict[tuple[str, str], list[tuple[ResultRow, float]]] = {}
    for row in rows:
        for dtype, slowdown in _emulated(row.details.arithmetic_slowdown or {}).items():
            emulations.setdefault((str(row.device_name), dtype), []).append((row, slowdown))
    for (device, dtype), measured in emulations.items():
        slowdown = statistics.median(slowdown for _, slowdown in measured)
        including = ", including the baseline's," if any(row.is_baseline for row, _ in measured) else ""
        yield (
            f"{device} emulates {dtype}: a matrix product takes {_times(slowdown)} as long there as in float32. "
            f"Speeds measured in {dtype}{including} show how fast the emulation is, not the model."
        )


def arithmetic_check(slowdowns: Mapping[str, float]) -> Check:
    """The check of this CPU. ``slowdowns``: for each dtype, the time of a matrix product divided by that in float32."""
    emulated = _emulated(slowdowns)
    remarks = [
        f"emulates {dtype}: a matrix product takes {_times(slowdown)} as long as in float32"
        for dtype, slowdown in emulated.items()
    ]
    if "bfloat16" not in emulated:
        remarks.insert(0, "computes in bfloat16 as fast as in float32")
        return check("cpu", State.OK, "; ".join(remarks))
    return check("cpu", State.NOTE, "; ".join([*remarks, "the speeds of 16-bit models show how fast the emulation is"]))


def native_check(instructions: str) -> Check:
    """The check of a CPU that reports ``instructions`` for bfloat16, so that nothing needs to be measured."""
    return check("cpu", State.OK, f"computes in bfloat16 natively ({instructions}); --deep measures how fast")


def _emulated(slowdowns: Mapping[str, float]) -> dict[str, float]:
    return {dtype: slowdown for dtype, slowdown in slowdowns.items() if slowdown >= LEAST_SLOWDOWN}


def _times(slowdown: float) -> str:
    return f"{show_float(slowdown, 2)} times"
