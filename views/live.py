"""Progress of jobs while a command waits: a live display on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from qbatch.core.domain import ENDED_STATES, JobState, Stage
from qbatch.views.cadence import Cadence
from qbatch.views.formats import printable
from qbatch.views.listings import show_progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

Job = Mapping[str, Any]
_MOST_RUNNING_SHOWN = 12
_MOST_RUNNING_NAMED = 3
_NO_WORKER = "jobs are queued and no worker is live: start one with `qbatch up` or `qbatch worker`"
_STARTING = "the worker is starting, which takes longest the first time: it imports torch and transformers"


class LiveProgress:
    """Shows the progress of jobs on ``stream`` (default: standard error). A context manager.

    On a terminal: a bar of finished jobs, and each running job with its stage and bytes. Elsewhere: a line for each
    change of a job's state or stage, and a line from time to time while nothing changes. ``quiet`` shows nothing.
    ``starts_workers``: the waiting command has just started workers itself, so having none yet is normal.
    """

    def __init__(
        self,
        *,
        quiet: bool,
        stream: TextIO | None = None,
        starts_workers: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet = quiet
        self._starts_workers = starts_workers
        self._cadence = Cadence(clock)
        self._stream = sys.stderr if stream is None else stream
        self._live: Live | None = None
        self._seen: dict[str, tuple[str, str | None]] = {}
        self._warned = False

    def __enter__(self) -> Self:
        if not self._quiet and self._stream.isatty():
            self._live = _start_live(self._stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, jobs: Sequence[Job], workers: int) -> None:
        """Show ``jobs``, rows of ``qbatch.models_db.listing.list_jobs``. ``workers``: how many are live."""
        if self._quiet:
            return
        for job in jobs:
            self._note_change(job)
        awaits_worker = workers == 0 and any(job["state"] == JobState.QUEUED for job in jobs)
        if awaits_worker and not self._starts_workers and not self._warned:
            self._warned = True
            self._say(_NO_WORKER)
        starting = awaits_worker and self._starts_workers
        if self._live is not None:
            self._live.update(_frame(jobs, self._live.console, self._cadence.elapsed_s, starting), refresh=True)
        elif self._cadence.is_due():
            self._say(f"{self._cadence.elapsed_s:.0f} s: {_STARTING if starting else _standing(jobs)}")

    def _note_change(self, job: Job) -> None:
        now = (job["state"], job["stage"])
        # A job seen for the first time counts as queued before: a queued one is no news.
        before = self._seen.get(job["job_id"], (JobState.QUEUED, None))
        self._seen[job["job_id"]] = now
        # On a terminal, the frame shows the running jobs; only failures should stay on the screen.
        if now != before and (self._live is None or job["state"] == JobState.FAILED):
            self._say(_news(job))

    def _say(self, line: str) -> None:
        self._cadence.note_line()
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(line))
        else:
            print(line, file=self._stream, flush=True)


def _start_live(stream: TextIO) -> Live:
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(file=stream), auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    live.start()
    return live


def _name(job: Job) -> str:
    return printable(f"{job['job_id']} {job['model']} {'baseline' if job['scheme'] == 'none' else job['scheme']}")


def _news(job: Job) -> str:
    state = job["stage"] or job["state"]
    if job["state"] == JobState.FAILED:
        words = printable(": ".join(filter(None, (state, job["error_kind"], job["error_message"]))))
        state = f"{words} (see `qbatch logs {job['job_id']}`)"
    if job["state"] == JobState.QUEUED:
        state = "back in the queue"
    return f"{_name(job)}: {state}"


def _standing(jobs: Sequence[Job]) -> str:
    """A summary while nothing changes: ``1/6 jobs, 2 running, 3 queued: j1 llama baseline: benchmarking``"""
    running = [job for job in jobs if job["state"] == JobState.RUNNING]
    named = [_news(job) for job in running[:_MOST_RUNNING_NAMED]]
    more = [f"and {len(running) - len(named)} more"] if len(running) > len(named) else []
    return ", ".join(_counts(jobs)) + ("; " if named else "") + ", ".join([*named, *more])


def _frame(jobs: Sequence[Job], console: Console, elapsed_s: float, starting: bool) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    running = [job for job in jobs if job["state"] == JobState.RUNNING]
    # A frame that is taller than the terminal cannot be redrawn in place.
    shown = running[: max(1, min(_MOST_RUNNING_SHOWN, console.height - 4))]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="ellipsis", no_wrap=True)
    grid.add_column(no_wrap=True, min_width=max(len(stage) for stage in Stage))
    grid.add_column(overflow="ellipsis", no_wrap=True)
    for job in shown:
        progress = show_progress(job["progress"]) if job["progress"] else ""
        grid.add_row(Text(_name(job)), Text(job["stage"] or ""), Text(progress))
    more = [Text(f"and {len(running) - len(shown)} more")] if len(running) > len(shown) else []
    more += [Text(_STARTING)] if starting else []
    return Group(_bar(jobs, elapsed_s), grid, *more)


def _bar(jobs: Sequence[Job], elapsed_s: float) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    ended = sum(job["state"] in ENDED_STATES for job in jobs)
    # The seconds show that the display is alive.
    words = [*_counts(jobs), f"{elapsed_s:.0f} s"]
    bar = Table.grid(padding=(0, 2, 0, 0))
    bar.add_row(ProgressBar(total=max(1, len(jobs)), completed=ended, width=30), Text(", ".join(words)))
    return bar


def _counts(jobs: Sequence[Job]) -> list[str]:
    """``2/6 jobs``, ``1 running``, …"""
    ended = sum(job["state"] in ENDED_STATES for job in jobs)
    counts = {state: sum(job["state"] == state for job in jobs) for state in JobState}
    shown = (JobState.RUNNING, JobState.QUEUED, JobState.FAILED, JobState.CANCELLED)
    return [f"{ended}/{len(jobs)} jobs", *(f"{counts[state]} {state}" for state in shown if counts[state])]
