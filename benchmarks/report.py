"""What the benchmarks print: progress on standard error, and figures in tables."""

from __future__ import annotations

import sys
import time

_BEGAN_S = time.monotonic()


def log(text: str) -> None:
    """Print ``text`` with the seconds since the benchmark began."""
    print(f"{time.monotonic() - _BEGAN_S:7.1f} s  {text}", file=sys.stderr, flush=True)


def show(value: float | None, form: str) -> str:
    """``value`` in the format ``form``, or a dash if it is not known."""
    return "–" if value is None else format(value, form)
