"""The folder in which multiprocessing keeps its socket: a killed worker cannot remove its own, so the next one does."""

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
    """What multiprocessing starts first within this context has its sockets in a new ``<prefix>-<pid>-…``.

    The folder goes with this process. Those of processes that are no more are removed, now and when this one ends: one
    that was just killed may take a moment to be gone. ``prefix`` must be short, since socket paths over about 100 bytes
    fail, and be no other pid namespace's.
    """
    _sweep(prefix)
    folder = tempfile.mkdtemp(prefix=f"{prefix.name}-{os.getpid()}-", dir=prefix.parent)
    # After multiprocessing has removed its own folder in it, at -100.
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
            # Another worker may be at it too.
            shutil.rmtree(folder, ignore_errors=True)


def _is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:  # another user's may be hidden
        return not psutil.pid_exists(pid)
