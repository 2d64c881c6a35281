"""A folder for sockets that only this user can access. In another user's folder, that user could listen in."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

from qbatch.core.errors import StorageUnavailable

# A socket path may have 107 bytes, and the longest one below this folder, of a worker's forkserver, takes 84 of them.
_LONGEST_RUNTIME_DIR = 23


def make_private(folder: Path) -> None:
    """Create ``folder`` unless it exists. Raises StorageUnavailable if it exists and is not private, or OSError."""
    if not os.path.lexists(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    fault = why_not_private(folder)
    if fault is not None:
        raise StorageUnavailable(
            f"{folder} {fault}, so it is not a private directory of this user:"
            " remove it, or set XDG_RUNTIME_DIR to a folder of your own"
        )


def why_not_private(folder: Path) -> str | None:
    """Why ``folder`` is unsafe for sockets, as the predicate of a sentence; None if it is private or does not exist."""
    try:
        result = folder.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(result.st_mode):
        return "is not a directory"
    if result.st_uid != os.getuid():
        return f"belongs to {_name(result.st_uid)}"
    mode = stat.S_IMODE(result.st_mode)
    return None if mode == 0o700 else f"is open to others (mode {mode:04o})"


def is_private(folder: Path) -> bool:
    return os.path.lexists(folder) and why_not_private(folder) is None


def is_runtime_dir(folder: Path | None) -> bool:
    """Whether ``folder`` is usable as XDG_RUNTIME_DIR: it exists, is private, and is short enough for a socket path."""
    return (
        folder is not None
        and folder.is_absolute()
        and len(os.fsencode(folder)) <= _LONGEST_RUNTIME_DIR
        and is_private(folder)
        and os.access(folder, os.W_OK | os.X_OK)
    )


def _name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
