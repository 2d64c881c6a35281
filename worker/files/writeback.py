"""Begins to write a file to the disk while more of it is still being computed."""

from __future__ import annotations

import ctypes

# Linux has it, and other systems do not.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2


def start_writeback(descriptor: int, start: int, nbytes: int) -> None:
    """Let the kernel write ``nbytes`` from ``start`` of an open file to the disk, without waiting until they are there.

    Left to itself, it begins half a minute later, or when its memory fills, so that the sync before the file is
    published would wait for all of it. This is only a hint: a file system that has no such thing is none the worse for
    it, and an error of the disk is reported by that sync.
    """
    if _sync_file_range is not None:
        _sync_file_range(
            descriptor, ctypes.c_int64(start), ctypes.c_int64(nbytes), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
        )
