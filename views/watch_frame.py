"""The lines of a terminal that show batches while they run. Each fits the terminal; nothing here draws them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from qbatch.core.byte_units import GIB
from qbatch.core.domain import LOST, JobState, WorkerState
from qbatch.core.watched import Snapshot, WatchedBatch, WatchedJob, WatchedWorker
from qbatch.views.formats import printable, text_width
from qbatch.views.listings import show_moved
from qbatch.views.shortened import cut, fit_names, pad, shorten
from qbatch.views.units import show_clock, show_duration, show_time_left

_GAP = "  "
_INDENT = "   "
# Under this width, what a job does stands on a line of its own.
_ONE_LINE = 72
_MOST_WORKERS = 8
_MOST_BATCHES = 4
_LEAST_NAME = 12
_LEAST_DOING = 16
# Most of what jobs do fits into this width, so that columns do not move with each step.
_USUAL_DOING = 23
_BAR = (10, 30)


class Style(StrEnum):
    """How a part of a line looks where there are colours; its words say the same."""

    PLAIN = "none"
    FAINT = "dim"
    GOOD = "green"
    BAD = "red"
    NOTE = "yellow"


@dataclass(frozen=True, slots=True)
class Part:
    text: str
    style: Style = Style.PLAIN


Line = Sequence[Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenSize:
    """The size of a terminal, in characters."""

    width: int
    height: int


def frame(snapshot: Snapshot, size: ScreenSize, notes: Sequence[str] = ()) -> list[Line]:
    """At most as many lines as the terminal shows, each at most as wide: batches, running jobs, workers, ``notes``."""
    room = max(1, size.height - 1)
    lines = _batches(snapshot.batches, size.width)
    last = [[Part(text, Style.NOTE)] for note in (*snapshot.pauses, *notes) for text in _wrapped(note, size.width)]
    room -= len(lines) + len(last)
    workers = _workers(snapshot.workers, size.width, max(1, min(_MOST_WORKERS, room // 3)))
    jobs = _jobs(snapshot.running, size.width, max(1, room - len(workers)))
    return [_fitting(line, size.width) for line in (lines + jobs + workers + last)[: max(1, size.height - 1)]]


def counts(snapshot_or_batch: Snapshot | WatchedBatch) -> list[str]:
    """``2/6 jobs``, ``1 running``, …"""
    return [part.text for part in _counts(snapshot_or_batch)]


def describe_doing(job: WatchedJob) -> str:
    """What a running job does within its stage, in a few words; empty if nothing is known of it."""
    progress = job.progress
    if not job.is_active and job.stage not in (None, "fetching"):
        return "waits for its turn"
    if progress.step is not None:
        return printable(progress.step)
    return show_moved(progress) if job.stage in ("fetching", "quantizing") else ""


def name_of(job: WatchedJob) -> str:
    return printable(f"{job.job_id} {job.model} {job.scheme}")


def _counts(of: Snapshot | WatchedBatch) -> list[Part]:
    batches = of.batches if isinstance(of, Snapshot) else (of,)
    by_state = {state: sum(batch.counts.get(state, 0) for batch in batches) for state in JobState}
    ended = sum(batch.ended for batch in batches)
    styles = {JobState.RUNNING: Style.PLAIN, JobState.QUEUED: Style.PLAIN, JobState.FAILED: Style.BAD}
    shown = (JobState.RUNNING, JobState.QUEUED, JobState.FAILED, JobState.CANCELLED)
    return [
        Part(f"{ended}/{sum(by_state.values())} jobs"),
        *(Part(f"{by_state[state]} {state}", styles.get(state, Style.NOTE)) for state in shown if by_state[state]),
    ]


def _batches(batches: Sequence[WatchedBatch], width: int) -> list[Line]:
    # If there are too many batches, those that have ended are left out first.
    open_ones = [batch for batch in batches if batch.is_open]
    kept = (open_ones or batches)[-_MOST_BATCHES:] if len(batches) > _MOST_BATCHES else batches
    lines = [line for batch in kept for line in _batch(batch, width)]
    hidden = len(batches) - len(kept)
    return [*lines, [Part(f"and {hidden} more batches", Style.FAINT)]] if hidden else lines


def _batch(batch: WatchedBatch, width: int) -> list[Line]:
    how_many, times = _counts(batch), _times(batch)
    name = shorten(printable(f"{batch.batch_id} {batch.name}" if batch.name else batch.batch_id), max(10, width // 4))
    room = width - text_width(name) - len(_GAP) * 2 - _comma_separated(how_many)
    # The times go to the next line if both do not fit on one.
    beside = room - _comma_separated(times) - 2
    bar_width = max(_BAR[0], min(_BAR[1], beside if beside >= _BAR[0] else room - 1))
    head = [Part(name + _GAP), *_bar(batch.ended, batch.jobs, bar_width), Part(_GAP)]
    return _listed(head, [*how_many, *times], width)


def _times(batch: WatchedBatch) -> list[Part]:
    elapsed = [] if batch.elapsed_s is None else [Part(show_duration(batch.elapsed_s))]
    has_left = batch.left_s is not None and batch.is_open
    return [*elapsed, Part(f"{show_time_left(batch.left_s or 0.0)} left")] if has_left else elapsed


def _comma_separated(words: Sequence[Part]) -> int:
    return sum(text_width(word.text) + 2 for word in words) - 2


def _bar(done: int, total: int, width: int) -> list[Part]:
    filled = width * done // max(1, total)
    return [Part("━" * filled, Style.GOOD), Part("─" * (width - filled), Style.FAINT)]


def _listed(head: Sequence[Part], words: Sequence[Part], width: int) -> list[Line]:
    """``head`` and ``words``, with commas between these, on as many lines as it takes."""
    lines: list[list[Part]] = [list(head)]
    for number, word in enumerate(words):
        comma = "" if number == len(words) - 1 else ","
        is_first = number == 0
        if _width(lines[-1]) + text_width(word.text + comma) + (not is_first) > width:
            lines.append([Part(_INDENT)])
        elif not is_first:
            lines[-1].append(Part(" "))
        lines[-1] += [word, Part(comma)]
    return list(lines)


def _jobs(jobs: Sequence[WatchedJob], width: int, room: int) -> list[Line]:
    if not jobs:
        return []
    per_job = 1 if width >= _ONE_LINE else 2
    fitting = max(1, room // per_job)
    # If not all can be shown, the jobs that are worked on come first.
    shown = jobs if len(jobs) <= fitting else sorted(jobs, key=lambda job: not job.is_active)[: max(1, fitting - 1)]
    lines = _table(shown, width) if per_job == 1 else [line for job in shown for line in _two_lines(job, width)]
    hidden = len(jobs) - len(shown)
    return [*lines, [Part(f"and {hidden} more running", Style.FAINT)]] if hidden else lines


def _table(jobs: Sequence[WatchedJob], width: int) -> list[Line]:
    """A line for each job. The names give way first, in their middle, then what the jobs do."""
    elapsed = [_elapsed(job) for job in jobs]
    doing = [describe_doing(job) for job in jobs]
    stages = [job.stage or "" for job in jobs]
    ids, schemes = [job.job_id for job in jobs], [job.scheme for job in jobs]
    fixed = sum(map(_widest, (ids, schemes, stages, elapsed))) + 5 * len(_GAP)
    models = [printable(job.model) for job in jobs]
    name_width, doing_width = _shared(width - fixed, _widest(models), max(_USUAL_DOING, _widest(doing)))
    names = fit_names(models, name_width)
    name_width = _widest(names)
    return [
        [
            Part(pad(ids[number], _widest(ids)) + _GAP),
            Part(pad(names[number], name_width) + _GAP),
            Part(pad(schemes[number], _widest(schemes)) + _GAP),
            Part(pad(stages[number], _widest(stages)) + _GAP, Style.GOOD if job.is_active else Style.FAINT),
            Part(pad(cut(doing[number], doing_width), doing_width) + _GAP, _style(job)),
            Part(pad("", _widest(elapsed) - text_width(elapsed[number])) + elapsed[number], Style.FAINT),
        ]
        for number, job in enumerate(jobs)
    ]


def _shared(room: int, name: int, doing: int) -> tuple[int, int]:
    """(columns of the name, columns of what is done), of so many that there are, and that each would like to have."""
    if name + doing <= room:
        return name, doing
    name_width = max(min(name, _LEAST_NAME), room - doing)
    return name_width, max(min(doing, _LEAST_DOING), room - name_width)


def _two_lines(job: WatchedJob, width: int) -> list[Line]:
    model = shorten(printable(job.model), max(4, width - text_width(job.job_id) - text_width(job.scheme) - 2))
    doing = " ".join(filter(None, (job.stage, describe_doing(job))))
    elapsed = _elapsed(job)
    room = width - len(_INDENT) - text_width(elapsed) - 1
    return [
        [Part(f"{job.job_id} {model} {job.scheme}")],
        [Part(_INDENT), Part(pad(cut(doing, room), room) + " ", _style(job)), Part(elapsed, Style.FAINT)],
    ]


def _elapsed(job: WatchedJob) -> str:
    return "" if job.elapsed_s is None else show_clock(job.elapsed_s)


def _style(job: WatchedJob) -> Style:
    return Style.PLAIN if job.is_active else Style.FAINT


def _workers(workers: Sequence[WatchedWorker], width: int, room: int) -> list[Line]:
    if not workers:
        return []
    # If not all can be shown, the workers that have jobs come first.
    shown = sorted(workers, key=lambda worker: not worker.jobs)
    shown = shown if len(shown) <= room else shown[: max(1, room - 1)]
    several = len({worker.host for worker in workers}) > 1
    labels = [_label(worker, with_host=several) for worker in shown]
    memory = [_memory(worker) for worker in shown]
    busy = [_busy(worker) for worker in shown]
    jobs = [worker_state(worker) for worker in shown]
    taken = _widest(labels) + _widest(memory) + _widest(busy) + 4 * len(_GAP)
    devices = [printable(worker.device_name) for worker in shown]
    jobs_width = min(_widest(jobs), max(12, (width - taken) // 2))
    device_width = min(_widest(devices), width - taken - jobs_width)
    lines: list[Line] = []
    for number, worker in enumerate(shown):
        device = pad(shorten(devices[number], device_width), device_width) + _GAP if device_width >= 8 else ""
        style = Style.PLAIN if worker.state == WorkerState.READY else Style.BAD
        lines.append(
            [
                Part(pad(labels[number], _widest(labels)) + _GAP),
                Part(device, Style.FAINT),
                Part(pad(memory[number], _widest(memory)) + _GAP if _widest(memory) else ""),
                Part(pad(busy[number], _widest(busy)) + _GAP if _widest(busy) else ""),
                Part(jobs[number], style if worker.jobs or style is Style.BAD else Style.FAINT),
            ]
        )
    hidden = len(workers) - len(shown)
    return [*lines, [Part(f"and {hidden} more workers", Style.FAINT)]] if hidden else lines


def worker_state(worker: WatchedWorker) -> str:
    """What a worker does: the jobs that it holds, or that it has none; what else there is to say of it."""
    jobs = ", ".join(worker.jobs)
    if worker.state == WorkerState.READY:
        return jobs or "idle"
    silent = "not heard of for a while" if worker.state == LOST else worker.state
    return f"{jobs} ({silent})" if jobs else silent


def _label(worker: WatchedWorker, *, with_host: bool) -> str:
    device = worker.name.partition("-")[0]
    return printable(f"{device}@{worker.host}" if with_host else device)


def _memory(worker: WatchedWorker) -> str:
    total = worker.memory_bytes / GIB
    return f"{total:.0f} GiB" if worker.used_bytes is None else f"{worker.used_bytes / GIB:.1f}/{total:.0f} GiB"


def _busy(worker: WatchedWorker) -> str:
    return "" if worker.busy_share is None else f"{worker.busy_share:4.0%} busy"


def _wrapped(text: str, width: int) -> Iterable[str]:
    import textwrap

    return textwrap.wrap(printable(text), max(10, width))


def _widest(texts: Iterable[str]) -> int:
    return max(map(text_width, texts), default=0)


def _width(line: Line) -> int:
    return sum(text_width(part.text) for part in line)


def _fitting(line: Line, width: int) -> Line:
    """The line, without what would stand beyond the terminal's last column."""
    kept: list[Part] = []
    for part in line:
        room = width - _width(kept)
        kept.append(Part(cut(part.text, room), part.style))
        if text_width(part.text) > room:
            break
    return kept
