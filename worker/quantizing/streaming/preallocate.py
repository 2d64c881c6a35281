"""Reserves disk space for a file before it is written."""

from __future__ import annotations

import ctypes
import os

from qbatch.core.filesystem import UNSUPPORTED_ERRNOS

_libc = ctypes.CDLL(None, use_errno=True)


def preallocate(descriptor: int, nbytes: int) -> None:
    """Allocate ``nbytes`` of disk space for an open file, and set its length to that. Raises OSError (ENOSPC).

    ``os.posix_fallocate`` is not used because it writes to every block if the file system cannot preallocate.
    """
    if nbytes == 0:
        return
    result = _libc.fallocate(descriptor, ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(nbytes))
    # If the file system cannot preallocate, the file simply grows while it is written.
    if result != 0 and (code := ctypes.get_errno()) not in UNSUPPORTED_ERRNOS:
        raise OSError(code, os.strerror(code))
