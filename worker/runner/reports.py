"""Report the progress and outcome of the jobs of a bundle, and keep track of which are still open."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from qbatch.core.digest import Checksums
from qbatch.core.domain import Stage
from qbatch.core.errors import CudaOom, DeviceError, DiskFull, HostOom, InternalError, JobError, SourceChanged, one_line
from qbatch.core.file_stat import FileStat
from qbatch.worker.quantizing.faults import as_job_error, with_traceback_noted
from qbatch.worker.runner.messages import (
    Answered,
    Entered,
    Failed,
    FilesHashed,
    FilesKnown,
    FilesSeen,
    Measured,
    Progressed,
    Question,
    Reply,
    Resolved,
    RunnerMessage,
    Searched,
    Stepped,
)
from qbatch.worker.sources.fetch import LocalSource

log = logging.getLogger("qbatch.runner")

_PROGRESS_INTERVAL_S = 0.3


class ReportChannel(Protocol):
    """The channel to the supervisor (see ``qbatch.worker.runner.process``)."""

    def send(self, message: RunnerMessage) -> None: ...

    def ask(self, question: Question) -> Reply: ...


class Reports:
    """Sends one final message per job, unless a fault makes the device unusable for the remaining jobs."""

    def __init__(self, link: ReportChannel, job_ids: Iterable[int]) -> None:
        self._link = link
        self._open = set(job_ids)
        self._entered: tuple[tuple[int, ...], Stage] | None = None

    def open(self, job_ids: Iterable[int] | None = None) -> tuple[int, ...]:
        """The jobs among ``job_ids`` (by default all) that have not ended, in ascending order."""
        return tuple(sorted(self._open if job_ids is None else self._open.intersection(job_ids)))

    def send(self, message: RunnerMessage) -> None:
        self._link.send(message)

    def known(self, stats: Iterable[FileStat]) -> Mapping[FileStat, Checksums]:
        """The checksums of the files that were hashed in that state before."""
        reply = self._link.ask(FilesSeen(stats=tuple(stats)))
        assert isinstance(reply, FilesKnown)  # noqa: S101  (each question has its reply)
        return reply.digests

    def remember(self, digests: Mapping[FileStat, Checksums]) -> None:
        if digests:
            self._link.send(FilesHashed(digests=digests))

    def ask(self, resolved: Resolved) -> Answered:
        """Ask what is known about these jobs. Jobs that need no work are closed."""
        reply = self._link.ask(resolved)
        assert isinstance(reply, Answered)  # noqa: S101  (each question has its reply)
        self._open -= reply.job_ids
        return reply

    def enter(self, job_ids: Iterable[int], stage: Stage) -> None:
        """Report that the runner now works on the open jobs among ``job_ids``, and on no others."""
        ids = self.open(job_ids)
        if ids and (ids, stage) != self._entered:
            self._entered = (ids, stage)
            log.info("%s: %s", ", ".join(f"j{n}" for n in ids), stage)
            self._link.send(Entered(job_ids=ids, stage=stage))

    def step(self, job_ids: Iterable[int], step: str) -> None:
        """Report what the runner now measures of the open jobs among ``job_ids``."""
        ids = self.open(job_ids)
        if ids:
            log.info("%s: %s", ", ".join(f"j{n}" for n in ids), step)
            self._link.send(Stepped(job_ids=ids, step=step))

    def done(self, message: Measured | Searched) -> None:
        self._open.discard(message.job_id)
        self._link.send(message)

    def throttled(self, message: Callable[..., Progressed]) -> Callable[..., None]:
        """A function that sends ``message`` of its arguments, at most every ``_PROGRESS_INTERVAL_S``.

        The last argument is the total. What reaches it is always sent.
        """
        last = 0.0

        def report(*numbers: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _PROGRESS_INTERVAL_S or sum(numbers[:-1]) == numbers[-1]:
                last = now
                self.send(message(*numbers))

        return report

    @contextlib.contextmanager
    def failing(self, job_ids: Iterable[int]) -> Iterator[None]:
        """An error within this context fails the open jobs among ``job_ids``, and no others."""
        try:
            yield
        except Exception as error:
            translated = error if isinstance(error, JobError) else _unforeseen(error)
            self.failed(job_ids, translated)

    def confirm(self, source: LocalSource) -> None:
        """If the source has changed, fail every open job and raise SourceChanged."""
        with self.failing_all_if_changed():
            source.confirm()

    @contextlib.contextmanager
    def failing_all_if_changed(self) -> Iterator[None]:
        """SourceChanged within this context fails every open job, and is raised.

        All of them fail, because their measurements would otherwise be compared although the source was not the same.
        """
        try:
            yield
        except SourceChanged as error:
            self.failed(self.open(), error)
            raise

    def failed(self, job_ids: Iterable[int], error: JobError) -> None:
        """Fail the open jobs among ``job_ids``. A device fault fails only the first: the others may not be at fault."""
        for job_id in self.open(job_ids):
            if job_id not in self._open:
                return
            log.error("\n".join((f"j{job_id}: {error.kind}: {error}", *getattr(error, "__notes__", ()))))
            self._open.discard(job_id)
            needed_bytes = error.needed_bytes if isinstance(error, DiskFull) else None
            self._link.send(Failed(job_id=job_id, kind=error.kind, message=str(error), needed_bytes=needed_bytes))
            self.leave_spoilt_device(error)

    def leave_spoilt_device(self, error: JobError) -> None:
        """After a device fault, leave the open jobs to a new runner, which starts with all of the device's memory."""
        if isinstance(error, (CudaOom, DeviceError)):
            self._open.clear()


def _unforeseen(error: Exception) -> JobError:
    # A faulty device may cause an error in anything that uses it, even in the import of bitsandbytes.
    cause = as_job_error(error)
    if isinstance(cause, (CudaOom, DeviceError, DiskFull, HostOom)):
        return cause
    return with_traceback_noted(InternalError(one_line(error)), error)
