"""Room on disk for a file that is about to be written."""

from __future__ import annotations

import ctypes
import os

from qbatch.core.filesystem import CANNOT

_libc = ctypes.CDLL(None, use_errno=True)


def reserve(descriptor: int, nbytes: int) -> None:
    """Have the file system set ``nbytes`` aside for a file, whose length becomes that. Raises OSError (ENOSPC).

    Not ``os.posix_fallocate``: where the file system cannot, that writes to every block instead.
    """
    if nbytes == 0:
        return
    done = _libc.fallocate(descriptor, ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(nbytes))
    if done != 0 and (code := ctypes.get_errno()) not in CANNOT:  # then the file grows as it is written, as ever
        raise OSError(code, os.strerror(code))
