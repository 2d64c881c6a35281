"""Where multiprocessing keeps its sockets, and who removes them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qbatch.worker.serving.sockets import own_sockets
from tests.waiting import until

_WORKER = """
import multiprocessing, os, signal, sys
from pathlib import Path
from qbatch.worker.serving.sockets import own_sockets

with own_sockets(Path(sys.argv[1])):
    multiprocessing.get_context("forkserver").Process(target=print).start()
print(*Path(sys.argv[1]).parent.glob("*/*/*"), flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="qb-", dir="/tmp") as folder:
        yield Path(folder)


def _worker(prefix: Path, end: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, str(prefix), end], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_killed_workers_sockets_are_removed_by_the_next_one(short: Path) -> None:
    prefix = short / "q"
    code, socket = _worker(prefix, "killed")
    assert code == -9
    (left,) = short.iterdir()
    assert Path(socket.strip()).is_relative_to(left)
    code, socket = _worker(prefix, "ended")
    assert code == 0
    assert not Path(socket.strip()).is_relative_to(left)
    assert list(short.iterdir()) == []


def test_a_living_workers_sockets_are_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / f"q-{os.getpid()}-abc"
    theirs.mkdir()
    with own_sockets(tmp_path / "q"):
        assert theirs.is_dir()


def test_one_that_is_killed_and_not_yet_waited_for_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as killed:
        theirs = tmp_path / f"q-{killed.pid}-abc"
        theirs.mkdir()
        killed.kill()
        until(lambda: psutil.Process(killed.pid).status() == psutil.STATUS_ZOMBIE, "its end")
        with own_sockets(tmp_path / "q"):
            assert not theirs.exists()
