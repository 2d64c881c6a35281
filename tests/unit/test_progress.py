"""Nobody waits in silence for the examples. This file imports nothing heavy: each piece of work imports it again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.progress import EVERY_S, BackgroundTask, progress


def slow(until: Path, report: Callable[[str], None]) -> str:
    """A piece of work that says one thing and is then silent until that file is there."""
    report("thinking")
    while not until.exists():
        time.sleep(0.05)
    return "was thought through"


def broken(report: Callable[[str], None]) -> str:
    report("about to fail")
    os._exit(3)


def test_silent_work_gets_a_progress_line_every_few_seconds(tmp_path: Path) -> None:
    started = time.monotonic()
    tasks = {name: BackgroundTask.start(slow, tmp_path / name) for name in ("one", "two")}
    at_s, lines = [], []
    for line in progress(tasks, every_s=0.2):
        at_s.append(time.monotonic() - started)
        lines.append(line)
        if line.endswith("one: thinking; two: thinking"):
            (tmp_path / "one").touch()
        if line.endswith("two: thinking") and "one:" not in line:
            (tmp_path / "two").touch()
    assert lines[0].endswith(("two: starting", "two: thinking")), "the first comes before the work has ended"
    assert any(line.endswith("one: thinking; two: thinking") for line in lines)
    assert lines[-1] == "was thought through"
    assert max(after - before for before, after in zip([0.0, *at_s], at_s, strict=False)) < 8
    assert EVERY_S < 8, "ten seconds without a line are too many"


def test_work_that_dies_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="one was not made: its process ended with code 3"):
        list(progress({"one": BackgroundTask.start(broken)}))
