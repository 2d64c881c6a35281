"""Format numbers with units as text. Callers must handle None themselves."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

from qbatch.core.byte_units import GIB, KIB, MIB


def show_bytes(count: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    if count < MIB // 10:
        return f"{count / KIB:.1f} KiB"
    if count < GIB:
        return f"{count / MIB:.1f} MiB"
    return f"{count / GIB:.2f} GiB"


def show_bytes_exactly(count: int) -> str:
    """Bytes in MiB, the unit of most size tables, followed by the exact number."""
    return f"{count / MIB:,.2f} MiB ({count:,} bytes)"


def show_seconds(seconds: float) -> str:
    """Seconds, or milliseconds below one second, to three significant figures."""
    if seconds >= 0.9995:
        return f"{show_float(seconds, 3)} s"
    return f"{show_float(seconds * 1000, 3)} ms"


def show_duration(seconds: float) -> str:
    """``41 s``, ``12 min 5 s``, ``3 h 20 min``, ``2 d 4 h``: the two largest units."""
    whole = round(seconds)
    sizes = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (size, unit), (smaller, smaller_unit) in pairwise(sizes):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {smaller_unit}" if rest else "")
    return f"{whole} s"


def show_clock(seconds: float) -> str:
    """``0:41``, ``12:05``, ``3:20:00``, ``2 d 4 h``: for columns in which it rises."""
    if seconds >= 86_400:
        return show_duration(seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_time_left(seconds: float) -> str:
    """``about 12 min``: no finer than an estimate is."""
    return f"about {_estimate(seconds)}"


def show_time_left_briefly(seconds: float) -> str:
    """``~12 min``, ``~2.1 h``, ``~3.5 d``: for columns."""
    if seconds < 3600:
        return f"~{_estimate(seconds)}"
    return f"~{seconds / 3600:.1f} h" if seconds < 2 * 86_400 else f"~{seconds / 86_400:.1f} d"


def _estimate(seconds: float) -> str:
    if seconds < 60:
        return f"{max(5, round(seconds / 5) * 5)} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    return show_duration(round(seconds / 300) * 300)


def show_count(count: int) -> str:
    """A count in thousands (k), millions (M) or billions (B), to three significant figures."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{show_float(count / size, 3)} {unit}"
    return str(count)


def show_rate(per_second: float, unit: str) -> str:
    """``35.4 tok/s``"""
    return f"{show_float(per_second, 3)} {unit}/s"


def show_float(value: float, figures: int = 4) -> str:
    """``value`` to ``figures`` significant figures, but never rounding digits before the decimal point.

    Scientific notation is only used from 10¹⁵ up.
    """
    if value == 0 or not abs(value) < 1e15:  # infinity and NaN too
        return f"{value:g}"
    exponent = int(f"{value:.{figures - 1}e}".partition("e")[2])
    return f"{value:,.{max(0, figures - 1 - exponent)}f}"


def show_nats(value: float) -> str:
    """A divergence in nats, to two significant figures: ``1.6e-03``. The order of magnitude matters most."""
    return f"{value:.1e}"


def show_percent(share: float) -> str:
    """A share between 0 and 1 in percent: 0.989 → ``98.9 %``."""
    return f"{share * 100:.1f} %"


def show_ratio(ratio: float) -> str:
    """``×0.29``"""
    return f"×{ratio:.3f}" if ratio < 0.1 else f"×{ratio:.2f}"


def show_change(ratio: float) -> str:
    """A ratio as a change in percent: 1.008 → ``+0.8 %``."""
    return f"{(ratio - 1) * 100:+.1f} %"


def show_time(iso: str) -> str:
    """An aware ISO 8601 time in the reader's local time zone."""
    return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def show_utc(iso: str) -> str:
    """An aware ISO 8601 time for readers in any time zone: ``2026-11-29 02:00 UTC``."""
    return datetime.fromisoformat(iso).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
