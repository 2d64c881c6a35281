"""A user without rights: what permissions refuse is refused to tests that root runs too."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_PR_CAPBSET_DROP = 24


def without_rights() -> Callable[[], None] | None:
    """A ``preexec_fn`` that takes root's capabilities away from what is started; None where they are not held.

    Between processes that hold none, the kernel's checks are those between two processes of any other user.
    """
    if os.getuid() != 0:
        return None
    prctl = ctypes.CDLL(None).prctl

    def drop() -> None:
        for capability in range(64):  # the kernel refuses those that it does not have
            prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)

    return drop
