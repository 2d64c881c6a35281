"""What is recorded of how far a bundle's jobs have come: the newest of many messages, about once a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from qbatch.core.domain import Stage
from qbatch.core.job_progress import JobProgress
from qbatch.worker.runner.messages import Progressed, Stepped

_EVERY_S = 1.0
# A rate over less than that says nothing.
_RATE_S = 0.5
_MOVES_BYTES = (Stage.FETCHING, Stage.QUANTIZING)


@dataclass(slots=True, kw_only=True)
class _Moving:
    """When the first bytes of a job's stage were reported, and how many there were then."""

    since: float
    bytes_then: int


@dataclass(slots=True, kw_only=True)
class RunningProgress:
    """Gathers the messages of a runner. A runner may report many times a second; each record is a transaction."""

    clock: Callable[[], float] = time.monotonic
    _known: dict[int, JobProgress] = field(default_factory=dict)
    _stages: dict[int, Stage] = field(default_factory=dict)
    _moving: dict[int, _Moving] = field(default_factory=dict)
    _unrecorded: set[int] = field(default_factory=set)
    _due_at: float = 0.0

    def entered(self, job_ids: Iterable[int], stage: Stage) -> None:
        """A stage has begun: what was said of the one before is over. One that is entered again goes on."""
        for job_id in job_ids:
            if self._stages.get(job_id) is stage and stage in _MOVES_BYTES:
                continue
            self._stages[job_id] = stage
            before = self._known.get(job_id, JobProgress())
            self._moving.pop(job_id, None)
            self._change(job_id, JobProgress() if stage in _MOVES_BYTES else replace(before, step=None))

    def moved(self, message: Progressed) -> None:
        read, written = message.bytes_read, message.bytes_written
        for job_id in message.job_ids:
            progress = JobProgress(
                bytes_read=read,
                bytes_written=written,
                bytes_total=message.bytes_total,
                bytes_per_s=self._rate(job_id, read + written),
            )
            self._change(job_id, progress)

    def stepped(self, message: Stepped) -> None:
        for job_id in message.job_ids:
            self._change(job_id, replace(self._known.get(job_id, JobProgress()), step=message.step))

    def is_due(self) -> bool:
        """Whether there is something to record, and the last time was long enough ago."""
        return bool(self._unrecorded) and self.clock() >= self._due_at

    def take(self) -> dict[int, JobProgress]:
        """What has changed since the last call, by job."""
        self._due_at = self.clock() + _EVERY_S
        taken = {job_id: self._known[job_id] for job_id in self._unrecorded}
        self._unrecorded.clear()
        return taken

    def _change(self, job_id: int, progress: JobProgress) -> None:
        if self._known.get(job_id) != progress:
            self._known[job_id] = progress
            self._unrecorded.add(job_id)

    def _rate(self, job_id: int, moved: int) -> float | None:
        now = self.clock()
        start = self._moving.setdefault(job_id, _Moving(since=now, bytes_then=moved))
        return (moved - start.bytes_then) / (now - start.since) if now - start.since >= _RATE_S else None
