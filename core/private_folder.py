"""A folder for sockets that is this user's alone: in anyone else's at its place, others could listen in."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

from qbatch.core.errors import StorageUnavailable

# The kernel takes 107 bytes, and the longest socket below it has 84: the one of a worker's forkserver.
_LONGEST_RUNTIME_DIR = 23


def make_private(folder: Path) -> None:
    """Make it unless it is there. Raises StorageUnavailable, saying whose it is, where it is not private; OSError."""
    if not os.path.lexists(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    fault = fault_of(folder)
    if fault is not None:
        raise StorageUnavailable(
            f"{folder} {fault}, so it is not a private directory of this user:"
            " have it removed, or set XDG_RUNTIME_DIR to a folder of your own"
        )


def fault_of(folder: Path) -> str | None:
    """Why nobody should put a socket there, as the end of a sentence; None for a private one, and for none."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    if found.st_uid != os.getuid():
        return f"belongs to {_name(found.st_uid)}"
    mode = stat.S_IMODE(found.st_mode)
    return None if mode == 0o700 else f"is open to others (mode {mode:04o})"


def is_private(folder: Path) -> bool:
    return os.path.lexists(folder) and fault_of(folder) is None


def is_runtime_dir(folder: Path | None) -> bool:
    """Whether it is what XDG_RUNTIME_DIR promises: there, ours alone, and short enough for a socket below it."""
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
