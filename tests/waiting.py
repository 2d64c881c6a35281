"""Waiting for what must come, without saying how fast the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

_POLL_S = 0.02


def until(
    condition: Callable[[], object], what: str = "such state", timeout_s: float = 120.0, *, poll_s: float = _POLL_S
) -> None:
    """Wait for ``condition``; fail the test if it does not come. The default is far above what any machine needs.

    A condition that starts a process wants a longer ``poll_s``: what is waited for needs the cores.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s"
        time.sleep(poll_s)
