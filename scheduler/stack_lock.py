"""The lock by which the commands of a home know whether its stack runs. It is looked at without importing the stack."""

from __future__ import annotations

import fcntl
from pathlib import Path

from qbatch.core.settings import Settings


def lock_of_stack(settings: Settings) -> Path:
    """The file that a running stack keeps locked."""
    return settings.home / "stack.lock"


def stack_is_running(settings: Settings) -> bool:
    """Whether another process holds the stack of this home."""
    try:
        lock = lock_of_stack(settings).open("r+b")
    except OSError:  # there is no lock file, or the home cannot belong to a stack of this user
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # the file system has no locks, and a stack does not start without them
            return False
        return False
