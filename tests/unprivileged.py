"""A user without rights: what permissions refuse is refused to tests that root runs too."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable

_PR_CAPBSET_DROP = 24
# CAP_SYS_PTRACE, and CAP_SYS_ADMIN and CAP_PERFMON, with which Linux lets one read a process too.
LOOKING_INTO_PROCESSES = (19, 21, 38)


def without_rights(capabilities: Iterable[int] = range(64)) -> Callable[[], None] | None:
    """A ``preexec_fn`` that takes root's capabilities away from what is started; None where they are not held.

    Between processes that lack one alike, the kernel's checks are those between two processes of any other user.
    """
    if os.getuid() != 0:
        return None
    prctl = ctypes.CDLL(None).prctl

    def drop() -> None:
        for capability in capabilities:  # the kernel refuses those that it does not have
            prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)

    return drop
