"""What somebody sees who watches batches: plain values, read from the database and drawn on a screen or in a log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qbatch.core.domain import ENDED_STATES, DeviceKind, JobState
from qbatch.core.job_progress import JobProgress
from qbatch.core.recovery import with_adapter_mark
from qbatch.core.search.mixture_origin import MixtureOrigin


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedJob:
    """A job. ``mixture``: what it has to do with a search; ``has_found``: it is a search that is over, and waits.
    ``recovery``: which adapter it has. ``is_active``: its runner works on it now, and not on another job of its bundle.
    ``elapsed_s`` is since it was claimed. ``was_begun``: whether any worker has begun it, so that it has a log. What is
    None is not known, or does not apply."""

    job_id: str
    model: str
    method: str
    recovery: str | None = None
    mixture: MixtureOrigin = field(default_factory=MixtureOrigin)
    has_found: bool = False
    state: JobState
    stage: str | None = None
    progress: JobProgress = field(default_factory=JobProgress)
    is_active: bool = True
    elapsed_s: float | None = None
    left_s: float | None = None
    error: str | None = None
    answered_by: str | None = None
    was_begun: bool = True

    @property
    def scheme(self) -> str:
        if self.recovery is not None:
            return with_adapter_mark(self.method, self.recovery)
        return "baseline" if self.method == "none" else f"{self.method}{self.mixture.title}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedWorker:
    """A worker with the ids of the jobs that it runs. ``state`` is as it is listed."""

    name: str
    host: str
    device_name: str
    state: str
    memory_bytes: int
    used_bytes: int | None = None
    busy_share: float | None = None
    jobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedBatch:
    """A batch with the number of its jobs in each state. ``elapsed_s`` is since its submit, until its end.

    ``lacks_device``: the kind of device that its queued jobs need, if no live worker has one.
    """

    batch_id: str
    name: str | None = None
    counts: Mapping[JobState, int]
    elapsed_s: float | None = None
    left_s: float | None = None
    lacks_device: DeviceKind | None = None

    @property
    def jobs(self) -> int:
        return sum(self.counts.values())

    @property
    def ended(self) -> int:
        return sum(self.counts.get(state, 0) for state in ENDED_STATES)

    @property
    def is_open(self) -> bool:
        return self.ended < self.jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One look. ``news`` are the jobs whose state or stage has changed since the last look, and ``more_news`` how many
    others have. ``workers`` are those that are live, or hold jobs. ``pauses`` say why nothing is sent to them.
    ``has_scheduler``: whether one leads."""

    batches: tuple[WatchedBatch, ...]
    running: tuple[WatchedJob, ...] = ()
    news: tuple[WatchedJob, ...] = ()
    more_news: int = 0
    workers: tuple[WatchedWorker, ...] = ()
    live_workers: int = 0
    has_scheduler: bool = True
    pauses: tuple[str, ...] = ()

    def count(self, state: JobState) -> int:
        return sum(batch.counts.get(state, 0) for batch in self.batches)

    @property
    def is_open(self) -> bool:
        return any(batch.is_open for batch in self.batches)

    @property
    def have_succeeded(self) -> bool:
        return all(batch.counts.get(JobState.SUCCEEDED, 0) == batch.jobs for batch in self.batches)

    @property
    def awaits_worker(self) -> bool:
        return self.live_workers == 0 and self.count(JobState.QUEUED) > 0
