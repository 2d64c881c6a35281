"""What the benchmarks print: progress on standard error, and figures in tables."""

from __future__ import annotations

import sys


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(value: float | None, form: str) -> str:
    """``value`` in the format ``form``, or a dash if it is not known."""
    return "–" if value is None else format(value, form)
