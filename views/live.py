"""Progress of jobs while a command waits: a live display on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from qbatch.core.domain import JobState
from qbatch.core.watched import Snapshot, WatchedJob
from qbatch.views.formats import printable
from qbatch.views.line_interval import LineInterval
from qbatch.views.shared_failures import hint_at_log, name_jobs
from qbatch.views.units import show_duration, show_time_left
from qbatch.views.watch_frame import Line, ScreenSize, counts, describe_doing, frame, name_of
from qbatch.views.why_waiting import why_waiting

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_MOST_RUNNING_NAMED = 3
NO_WORKER = "jobs are queued and no worker is live: start one with `qbatch up` or `qbatch worker`"
STARTING = "the workers are starting, which takes longest the first time: they import torch and transformers"
# rich's rule: on such a terminal nothing can be drawn again in place.
_DUMB = ("dumb", "unknown")
_CLEAR_LINE, _CLEAR_BELOW = "\x1b[2K", "\x1b[0J"


class LiveProgress:
    """Shows the progress of jobs on ``stream`` (default: standard error). A context manager.

    On a terminal: batches, running jobs and workers, drawn again in place, and above them each failure. Elsewhere: a
    line for each change of a job's state or stage, and a line from time to time while nothing changes. ``quiet`` shows
    nothing. ``why_no_worker`` says what to tell while jobs are queued and no worker is live.
    """

    def __init__(
        self,
        *,
        quiet: bool,
        stream: TextIO | None = None,
        why_no_worker: Callable[[], str] = lambda: NO_WORKER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet = quiet
        self._why_no_worker = why_no_worker
        self._interval = LineInterval(clock)
        self._stream = sys.stderr if stream is None else stream
        self._screen: _Screen | None = None
        self._last: Snapshot | None = None
        self._noted: str | None = None
        # For each failure of a model, the first job that was reported with it.
        self._failed_first: dict[tuple[str, str | None], str] = {}

    def __enter__(self) -> Self:
        if not self._quiet and _can_be_drawn_on(self._stream):
            self._screen = _Screen(self._stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._screen is not None:
            self._screen.close()

    def update(self, snapshot: Snapshot) -> None:
        if self._quiet:
            return
        for line in self._news(snapshot.news):
            self._say(line)
        if snapshot.more_news:
            self._say(f"and {snapshot.more_news} more jobs")
        self._last = snapshot
        self._show(snapshot, self._why_no_worker() if snapshot.awaits_worker else why_waiting(snapshot))

    def _news(self, news: Sequence[WatchedJob]) -> Iterable[str]:
        """A line for each job, and for each failure that jobs of a model share.

        On a terminal, the frame shows the running jobs; only failures should stay on the screen.
        """
        failed: dict[tuple[str, str | None], list[WatchedJob]] = {}
        for job in news:
            if job.state is JobState.FAILED:
                failed.setdefault((job.model, job.error), []).append(job)
        for job in news:
            if job.state is not JobState.FAILED:
                yield from [describe_news(job)] if self._screen is None else ()
            elif jobs := failed.pop(failure := (job.model, job.error), None):
                yield describe_failure(jobs, self._failed_first.setdefault(failure, job.job_id))

    def note_silence(self, reason: str) -> None:
        """The database does not answer. What was seen last stays."""
        if not self._quiet:
            self._show(self._last or Snapshot(batches=()), f"{reason}; trying again")

    def _show(self, snapshot: Snapshot, note: str | None) -> None:
        if self._screen is not None:
            self._screen.draw(snapshot, [note] if note else [])
        elif note is not None and note != self._noted:
            self._say(note)
        elif self._interval.is_due():
            standing = "; ".join(filter(None, (_standing(snapshot), note)))
            self._say(f"{show_duration(self._interval.elapsed_s)}: {standing}")
        self._noted = note or self._noted

    def _say(self, line: str) -> None:
        self._interval.note_line()
        if self._screen is not None:
            self._screen.say(line)
        else:
            print(line, file=self._stream, flush=True)


class _Screen:
    """A frame at the bottom of a terminal, drawn again in place.

    Not rich's Live, which goes up by as many lines as it drew also after the terminal has broken them anew.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._stream = stream
        self._console = Console(file=stream)
        self._width = self._console.width
        self._frame: list[str] = []

    def draw(self, snapshot: Snapshot, notes: Sequence[str]) -> None:
        lines = rendered(frame(snapshot, size_of(self._console), notes))
        self._replace([], self._terminal_text(lines))

    def say(self, line: str) -> None:
        """Print a line above the frame, where it stays."""
        from rich.text import Text

        is_same = self._console.width == self._width
        self._replace(self._terminal_text(Text(line)), self._frame if is_same and self._frame else [""])

    def close(self) -> None:
        self._stream.write("\n" if self._frame else "")
        self._stream.flush()

    def _replace(self, above: Sequence[str], lines: list[str]) -> None:
        if self._console.width != self._width:
            # Nobody knows how many lines the old frame has now. It stays, and another one begins below.
            self._width, start = self._console.width, "\n" if self._frame else ""
        else:
            start = f"\x1b[{len(self._frame) - 1}A\r" if len(self._frame) > 1 else "\r"
        shown = "\n".join(_CLEAR_LINE + line for line in (*above, *lines))
        self._stream.write(f"{start}{shown}{_CLEAR_BELOW}")
        self._stream.flush()
        self._frame = lines

    def _terminal_text(self, text: Text) -> list[str]:
        with self._console.capture() as captured:
            self._console.print(text)
        return captured.get().splitlines()


def size_of(console: Console) -> ScreenSize:
    return ScreenSize(width=console.width, height=console.height)


def rendered(lines: Sequence[Line]) -> Text:
    """For rich, which drops the colours where NO_COLOR is set."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop")
    for number, line in enumerate(lines):
        text.append("\n" if number else "")
        for part in line:
            text.append(part.text, style=part.style)
    return text


def _can_be_drawn_on(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "").lower() not in _DUMB


def describe_news(job: WatchedJob) -> str:
    """``j1 llama SCHEME: quantizing``"""
    return f"{name_of(job)}: {_what_happened(job)}"


def describe_failure(jobs: Sequence[WatchedJob], first: str) -> str:
    """``j1, j2 llama: failed: timeout: … (see `qbatch logs j1`)``, of jobs of one model that share an error; or
    ``j3 llama: failed like j1``, if the error was said of ``first`` before. What no worker has begun has no log."""
    ids, job = [one.job_id for one in jobs], jobs[0]
    whose = name_of(job) if len(jobs) == 1 else printable(f"{name_jobs(ids)} {job.model}")
    if first not in ids:
        return f"{whose}: failed like {first}"
    logged = next((hint_at_log(one.job_id) for one in jobs if one.was_begun), "")
    return f"{whose}: {printable(': '.join(filter(None, (job.state, job.error))))}{logged}"


def _what_happened(job: WatchedJob) -> str:
    if job.state is JobState.QUEUED:
        return "it has found its mixtures, and one is published next" if job.has_found else "back in the queue"
    if job.state is JobState.SUCCEEDED and job.answered_by is not None:
        return f"answered by {job.answered_by}"
    return job.stage or job.state


def describe_end(snapshot: Snapshot) -> str:
    """``b1: 5 of 6 jobs succeeded, 1 failed, after 12 min``"""
    return "; ".join(
        ", ".join(
            [
                f"{batch.batch_id}: {batch.counts.get(JobState.SUCCEEDED, 0)} of {batch.jobs} jobs succeeded",
                *(
                    f"{count} {state}"
                    for state in (JobState.FAILED, JobState.CANCELLED)
                    if (count := batch.counts.get(state, 0))
                ),
                *([f"after {show_duration(batch.elapsed_s)}"] if batch.elapsed_s is not None else []),
            ]
        )
        for batch in snapshot.batches
    )


def _standing(snapshot: Snapshot) -> str:
    """A summary while nothing changes: ``1/6 jobs, 2 running, about 5 min left; j1 llama baseline: kernels``"""
    running = sorted(snapshot.running, key=lambda job: not job.is_active)
    named = [f"{name_of(job)}: {describe_doing(job) or job.stage}" for job in running[:_MOST_RUNNING_NAMED]]
    more = [f"and {len(running) - len(named)} more"] if len(running) > len(named) else []
    left = [batch.left_s for batch in snapshot.batches if batch.is_open]
    known = [one for one in left if one is not None]
    until = [f"{show_time_left(max(known))} left"] if known and len(known) == len(left) else []
    return ", ".join([*counts(snapshot), *until]) + ("; " if named else "") + ", ".join([*named, *more])
