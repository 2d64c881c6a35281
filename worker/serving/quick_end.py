"""Imported by the forkserver, so that it ends at once with its worker.

An interpreter that ends takes all of its modules apart, which for torch and transformers keeps a core busy for half a
second. Nothing of a forkserver's needs that: its memory is the kernel's to take back.
"""

import atexit
import os
import sys

_FORKSERVER = os.getpid()


def _end() -> None:
    # Only in the forkserver itself: its forks must end with their own exit codes.
    if os.getpid() == _FORKSERVER:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# The first that is registered is the last that is called.
atexit.register(_end)
