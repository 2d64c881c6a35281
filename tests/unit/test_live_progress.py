"""Progress while a command waits: drawn again and again on a terminal, plain lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import pty
import re
import struct
import termios
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qbatch.core.domain import DeviceKind, JobState
from qbatch.core.job_progress import JobProgress
from qbatch.core.search.mixture_origin import MixtureOrigin
from qbatch.core.watched import Snapshot, WatchedBatch, WatchedJob
from qbatch.views.live import NO_WORKER, STARTING, LiveProgress, describe_end
from qbatch.views.why_waiting import NO_SCHEDULER

NAME = "llama"
_GIB = 2**30
_UP = "A\r\x1b[2K"
_END = "\x1b[0J"


def a_job(number: int, state: str = "running", **known: Any) -> WatchedJob:
    job = WatchedJob(job_id=f"j{number}", model=NAME, method="bnb-nf4", state=JobState(state))
    return replace(job, **known)


def a_look(*news: WatchedJob, running: Sequence[WatchedJob] = (), workers: int = 1, **counts: int) -> Snapshot:
    by_state = {JobState(state): count for state, count in counts.items()}
    batch = WatchedBatch(batch_id="b1", counts=by_state)
    return Snapshot(batches=(batch,), running=tuple(running), news=news, live_workers=workers)


def follow(*looks: Snapshot, quiet: bool = False, **options: Any) -> list[str]:
    stream = io.StringIO()
    with LiveProgress(quiet=quiet, stream=stream, **options) as progress:
        for look in looks:
            progress.update(look)
    return stream.getvalue().splitlines()


def test_a_log_gets_one_line_for_each_change() -> None:
    fetching, quantizing = a_job(1, stage="fetching"), a_job(1, stage="quantizing")
    lines = follow(
        a_look(queued=2),
        a_look(fetching, running=[fetching], queued=1),
        a_look(running=[fetching], queued=1),
        a_look(quantizing, running=[quantizing], queued=1),
        a_look(a_job(1, "failed", error="host_oom: killed"), a_job(2, "queued"), a_job(3, "succeeded"), failed=1),
        a_look(a_job(5, "queued", mixture=MixtureOrigin(bound={"max_kl": 0.1}), has_found=True), failed=1),
        replace(a_look(a_job(4, "succeeded", answered_by="j2"), succeeded=2), more_news=7),
    )
    assert lines == [
        f"j1 {NAME} bnb-nf4: fetching",
        f"j1 {NAME} bnb-nf4: quantizing",
        f"j1 {NAME} bnb-nf4: failed: host_oom: killed (see `qbatch logs j1`)",
        f"j2 {NAME} bnb-nf4: back in the queue",
        f"j3 {NAME} bnb-nf4: succeeded",
        f"j5 {NAME} bnb-nf4 auto: it has found its mixtures, and one is published next",
        f"j4 {NAME} bnb-nf4: answered by j2",
        "and 7 more jobs",
    ]


def test_a_failure_that_jobs_of_a_model_share_is_said_once() -> None:
    broken = {"state": "failed", "error": "source_corrupt: no header"}
    jobs = [a_job(number, **broken) for number in range(1, 5)]
    other = a_job(5, "failed", error="source_corrupt: no header", model="opt")
    assert follow(a_look(*jobs[:2], other, jobs[2], failed=4), a_look(jobs[3], failed=5)) == [
        "j1, j2, j3 llama: failed: source_corrupt: no header (see `qbatch logs j1`)",
        "j5 opt bnb-nf4: failed: source_corrupt: no header (see `qbatch logs j5`)",
        "j4 llama bnb-nf4: failed like j1",
    ]


def test_a_failure_of_jobs_that_no_worker_has_begun_names_no_log() -> None:
    broken = {"state": "failed", "error": "source_corrupt: no header", "was_begun": False}
    assert follow(a_look(a_job(1, **broken), a_job(2, **broken), failed=2)) == [
        "j1, j2 llama: failed: source_corrupt: no header"
    ]
    begun = a_job(2, **broken | {"was_begun": True})
    (line,) = follow(a_look(a_job(1, **broken), begun, failed=2))
    assert line.endswith("no header (see `qbatch logs j2`)")


def test_a_queue_without_a_worker_is_said_once() -> None:
    alone, served = a_look(queued=1, workers=0), a_look(queued=1)
    assert follow(alone, alone, served, alone) == [NO_WORKER]
    assert follow(a_look(succeeded=1, workers=0)) == []


class Seconds:
    """A clock that stands until it is moved on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def silences(look: Snapshot, updates: int, *, every_s: float = 0.5, **options: Any) -> tuple[list[float], list[str]]:
    """How long each line let wait for it while nothing changes, and the lines."""
    stream, clock, said_at, lines = io.StringIO(), Seconds(), [100.0], 0
    with LiveProgress(quiet=False, stream=stream, clock=clock, **options) as progress:
        for _ in range(updates):
            progress.update(look)
            clock.now += every_s
            if (said := len(stream.getvalue().splitlines())) > lines:
                lines = said
                said_at.append(clock.now)
    waits = [after - before for before, after in itertools.pairwise([*said_at, clock.now])]
    return waits, stream.getvalue().splitlines()


def test_a_log_gets_a_line_every_few_seconds_while_nothing_changes() -> None:
    job = a_job(1, stage="benchmarking", progress=JobProgress(step="speed, round 2/3"))
    look = a_look(running=[job], queued=1)
    look = replace(look, batches=(replace(look.batches[0], left_s=300.0),))
    waits, lines = silences(look, 360)
    assert max(waits) < 8
    assert lines[0] == f"5 s: 0/1 jobs, 1 queued, about 5 min left; j1 {NAME} bnb-nf4: speed, round 2/3"
    # Of a day it need not be 17,000 lines.
    assert len(silences(look, 17_280, every_s=5.0)[1]) < 1600


def test_a_log_says_that_the_workers_start() -> None:
    waits, lines = silences(a_look(queued=1, workers=0), 60, why_no_worker=lambda: STARTING)
    assert max(waits) < 8
    assert lines[0] == STARTING
    assert all(STARTING in line for line in lines)


def test_what_waits_for_a_device_or_a_scheduler_is_said() -> None:
    look = a_look(queued=1)
    lacking = replace(look, batches=(replace(look.batches[0], lacks_device=DeviceKind.CPU),))
    assert follow(look, lacking, replace(lacking, has_scheduler=False)) == [
        "b1 needs a CPU, and every live worker has a GPU: `qbatch worker --cpu` starts one without",
        NO_SCHEDULER,
    ]
    running = a_look(running=[a_job(1, stage="benchmarking")])
    assert follow(replace(running, has_scheduler=False)) == [], "nothing waits for it"


def test_quiet_says_nothing() -> None:
    assert follow(a_look(queued=1, workers=0), a_look(a_job(1, "failed"), failed=1), quiet=True) == []


def test_a_database_that_does_not_answer_is_said_once_and_time_goes_on() -> None:
    stream, clock = io.StringIO(), Seconds()
    with LiveProgress(quiet=False, stream=stream, clock=clock) as progress:
        progress.update(a_look(queued=1))
        for _ in range(12):
            progress.note_silence("the database does not answer")
            clock.now += 0.5
    first, *later = stream.getvalue().splitlines()
    assert first == "the database does not answer; trying again"
    assert later == ["5 s: 0/1 jobs, 1 queued; the database does not answer; trying again"]


def test_the_end_is_told_in_a_line() -> None:
    batch = WatchedBatch(batch_id="b1", counts={JobState.SUCCEEDED: 5, JobState.FAILED: 1}, elapsed_s=725.0)
    assert describe_end(Snapshot(batches=(batch,))) == "b1: 5 of 6 jobs succeeded, 1 failed, after 12 min 5 s"


class Terminal:
    """A terminal of some size, and what was written to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, width: int = 100, term: str = "xterm") -> None:
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", term)
        self._reader, writer = pty.openpty()
        # Rich asks the process's own streams for the size first.
        monkeypatch.setattr("rich.console._STD_STREAMS", (writer,))
        self.stream = os.fdopen(writer, "w", encoding="utf-8")
        self.resize(width)
        self.shown = ""

    def resize(self, width: int) -> None:
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    def read_until(self, awaited: str) -> str:
        """What comes up to ``awaited``. The kernel hands it over in pieces, and holds a few kilobytes at most."""
        shown = ""
        while awaited not in shown:
            shown += os.read(self._reader, 4096).decode(errors="replace")
        self.shown += shown
        return shown

    def close(self) -> None:
        self.stream.close()
        os.close(self._reader)


def test_a_terminal_gets_a_bar_the_running_jobs_and_the_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    moved = JobProgress(bytes_read=3 * _GIB, bytes_total=140 * _GIB)
    running = a_job(1, stage="quantizing", progress=moved)
    failed = a_job(2, "failed", error="timeout: too slow")
    with LiveProgress(quiet=False, stream=terminal.stream) as live:
        for look, awaited in (
            (a_look(queued=2, workers=0), "no worker is live"),
            (_second(running, failed), "3.0/140.0 GiB"),
            (a_look(succeeded=1, failed=1), "2/2 jobs"),
        ):
            live.update(look)
            terminal.read_until(awaited)
    terminal.close()
    for said in ("0/2 jobs", "quantizing", "failed: timeout: too slow (see `qbatch logs j2`)"):
        assert said in terminal.shown


def _second(running: WatchedJob, failed: WatchedJob) -> Snapshot:
    batch = WatchedBatch(batch_id="b1", counts={JobState.RUNNING: 1, JobState.FAILED: 1})
    return Snapshot(batches=(batch,), running=(running,), news=(failed,), live_workers=1)


def test_after_a_resize_the_frame_is_drawn_below_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the old one is, nobody knows: terminals break lines anew."""
    terminal = Terminal(monkeypatch, width=100)
    job = replace(a_job(1, stage="benchmarking"), model="m" * 90)
    look = replace(_second(job, a_job(2, "failed")), news=())
    drawn = []
    with LiveProgress(quiet=False, stream=terminal.stream) as live:
        for width in (100, 100, 40):
            terminal.resize(width)
            live.update(look)
            drawn.append(terminal.read_until(_END))
        terminal.resize(30)
        live.update(replace(look, news=(a_job(2, "failed"),)))
        said = terminal.read_until(_END)
    terminal.close()
    again, below = drawn[1:]
    assert _UP in again, "drawn again in place"
    assert below.startswith("\r\n")
    assert said.startswith("\r\n"), "a failure is not written over a frame that is elsewhere now"
    assert max(len(_visible(line)) for line in below.replace("\r", "").split("\n")) <= 40


def _visible(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    terminal = Terminal(monkeypatch, term=term)
    with LiveProgress(quiet=False, stream=terminal.stream) as live:
        live.update(_second(a_job(1, stage="loading"), a_job(2, "failed", error="timeout")))
        said = terminal.read_until("failed: timeout")
    terminal.close()
    assert "\x1b" not in said
