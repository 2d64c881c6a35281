"""The folder for multiprocessing's sockets. A killed worker cannot remove its folder, so the next worker does."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from pathlib import Path

import psutil


@contextmanager
def own_sockets(prefix: Path) -> Iterator[None]:
    """Within this context, what multiprocessing starts first has its sockets in a new folder ``<prefix>-<pid>-…``.

    The folder is removed when this process ends. Folders of dead processes are removed now and again at the end,
    because a process that was just killed may still exist for a moment. ``prefix`` must be short, because socket paths
    of more than about 100 bytes fail, and must not be used in another pid namespace.
    """
    _sweep(prefix)
    folder = tempfile.mkdtemp(prefix=f"{prefix.name}-{os.getpid()}-", dir=prefix.parent)
    # Runs after multiprocessing has removed its own folder inside, whose priority is -100.
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=-101)
    Finalize(None, _sweep, args=(prefix,), exitpriority=-102)
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def _sweep(prefix: Path) -> None:
    for folder in prefix.parent.glob(f"{prefix.name}-*-*"):
        pid = folder.name.removeprefix(f"{prefix.name}-").partition("-")[0]
        if pid.isdecimal() and _is_gone(int(pid)):
            # Errors are ignored because another worker may be removing it too.
            shutil.rmtree(folder, ignore_errors=True)


def _is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:  # the process may belong to another user and be hidden
        return not psutil.pid_exists(pid)
