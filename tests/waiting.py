"""Waiting for what must come, without saying how fast the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

_POLL_S = 0.02
# Who has waited long may be told later, by that share and no more than this: what is waited for needs the cores.
_LATE, _LATE_S = 0.05, 0.2


def until(
    condition: Callable[[], object], what: str = "such state", timeout_s: float = 120.0, *, poll_s: float = _POLL_S
) -> None:
    """Wait for ``condition``; fail the test if it does not come. The default is far above what any machine needs.

    A condition that starts a process wants a longer ``poll_s``: what is waited for needs the cores.
    """
    began = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - began
        assert waited_s < timeout_s, f"no {what} within {timeout_s:g} s"
        time.sleep(max(poll_s, min(_LATE * waited_s, _LATE_S)))
