"""Child processes: started again when they die, left alone when they refuse, gone when their parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from qbatch.scheduler import child_process
from qbatch.scheduler.child_process import FINAL, REFUSALS, Child
from tests.waiting import until

Start = Callable[..., Child]


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Start]:
    """Makes a child that runs a line of Python, its output in ``log``."""
    made: list[Child] = []

    def make(code: str) -> Child:
        made.append(Child("it", [sys.executable, "-c", code], env=dict(os.environ), log_path=tmp_path / "logs" / "log"))
        return made[-1]

    yield make
    for one in made:
        one.ask_to_stop(signal.SIGKILL)
        one.wait(5)


def ended(one: Child) -> int:
    code: int | None = None

    def has_ended() -> bool:
        nonlocal code
        code = one.supervise()
        return code is not None

    until(has_ended)
    assert code is not None
    return code


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_process_that_dies_is_restarted_with_growing_delays(
    child: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = child("print('here'); raise SystemExit(1)")
    one.start()
    assert ended(one) == 1
    assert one.supervise() is None
    assert one.pid is None, "not at once"
    until(lambda: one.supervise() is None and one.pid is not None)
    assert ended(one) == 1
    delays_s = [float(record.getMessage().split()[-2]) for record in caplog.records]
    assert delays_s == [1.0, 2.0]
    assert (tmp_path / "logs" / "log").read_text() == "here\nhere\n", "its output is appended"


@pytest.mark.parametrize("code", REFUSALS)
def test_a_process_that_refuses_to_work_is_not_restarted(child: Start, code: int) -> None:
    one = child(f"raise SystemExit({code})")
    one.start()
    assert ended(one) == code
    assert one.has_refused
    time.sleep(0.1)
    assert one.supervise() is None
    assert one.pid is None


@pytest.mark.parametrize("code", REFUSALS)
def test_a_process_that_worked_before_is_restarted(child: Start, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "_HEALTHY_AFTER_S", 0.0)
    one = child(f"raise SystemExit({code})")
    one.start()
    assert ended(one) == code
    assert not one.has_refused
    until(lambda: one.supervise() is None and one.pid is not None)


def test_a_process_whose_database_is_gone_is_not_restarted(child: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it did before: it would make an empty one."""
    monkeypatch.setattr(child_process, "_HEALTHY_AFTER_S", 0.0)
    one = child(f"raise SystemExit({FINAL})")
    one.start()
    assert ended(one) == FINAL
    assert one.has_refused


def test_a_living_process_runs_until_it_is_asked_to_stop(child: Start) -> None:
    one = child("import time; time.sleep(60)")
    one.start()
    pid = one.pid
    assert pid is not None
    assert one.supervise() is None
    assert one.pid == pid
    one.ask_to_stop()
    one.wait(5)
    assert one.pid is None
    assert is_gone(pid)
    one.ask_to_stop()
    one.wait(5)


def test_a_process_that_does_not_stop_is_killed(child: Start, tmp_path: Path) -> None:
    one = child("import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)")
    one.start()
    pid = one.pid
    assert pid is not None
    until(lambda: "deaf" in (tmp_path / "logs" / "log").read_text())
    one.ask_to_stop()
    one.wait(0.2)
    assert is_gone(pid)


def test_ctrl_c_at_the_terminal_does_not_reach_a_child(child: Start) -> None:
    one = child("import time; time.sleep(60)")
    one.start()
    assert one.pid is not None
    assert os.getpgid(one.pid) == one.pid


def test_a_child_dies_when_its_parent_is_killed() -> None:
    code = (
        "import os, sys, time; from qbatch.scheduler.child_process import Child;"
        "one = Child('it', [sys.executable, '-c', 'import time; time.sleep(60)'], env=dict(os.environ)); one.start();"
        "print(one.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert not is_gone(pid)
    parent.kill()
    parent.wait()
    until(lambda: is_gone(pid))
