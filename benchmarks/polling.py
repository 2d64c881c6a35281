"""Waits for what a program under measurement does."""

from __future__ import annotations

import time
from collections.abc import Callable

_PATIENCE_S = 900.0


def wait_until(condition: Callable[[], bool], what: str, *, poll_s: float) -> None:
    """Ask every ``poll_s`` seconds. Raises TimeoutError after 15 minutes."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {_PATIENCE_S:g} s")
        time.sleep(poll_s)
