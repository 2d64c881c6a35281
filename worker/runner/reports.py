"""What a bundle says of its jobs, and which of them are still open."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from qbatch.core.digest import Checksums
from qbatch.core.domain import Stage
from qbatch.core.errors import CudaOom, DeviceError, DiskFull, HostOom, InternalError, JobError, SourceChanged, one_line
from qbatch.core.file_stat import FileStat
from qbatch.worker.quantizing.faults import as_job_error
from qbatch.worker.runner.messages import (
    Answered,
    Entered,
    Failed,
    FilesHashed,
    FilesKnown,
    FilesSeen,
    Measured,
    Question,
    Reply,
    Resolved,
    RunnerMessage,
)
from qbatch.worker.sources.fetch import LocalSource

log = logging.getLogger("qbatch.runner")


class ReportChannel(Protocol):
    """How a bundle reports (see ``qbatch.worker.runner.process``)."""

    def send(self, message: RunnerMessage) -> None: ...

    def ask(self, question: Question) -> Reply: ...


class Reports:
    """Each job ends in one message, except after a fault that spoils the device for those left."""

    def __init__(self, link: ReportChannel, job_ids: Iterable[int]) -> None:
        self._link = link
        self._open = set(job_ids)
        self._entered: tuple[tuple[int, ...], Stage] | None = None

    def open(self, job_ids: Iterable[int] | None = None) -> tuple[int, ...]:
        """Those of ``job_ids`` (of all jobs) that have not ended, in ascending order."""
        return tuple(sorted(self._open if job_ids is None else self._open.intersection(job_ids)))

    def send(self, message: RunnerMessage) -> None:
        self._link.send(message)

    def known(self, stats: Iterable[FileStat]) -> Mapping[FileStat, Checksums]:
        """The digests of the files that were hashed in that state before."""
        reply = self._link.ask(FilesSeen(stats=tuple(stats)))
        assert isinstance(reply, FilesKnown)  # noqa: S101  (each question has its reply)
        return reply.digests

    def remember(self, digests: Mapping[FileStat, Checksums]) -> None:
        if digests:
            self._link.send(FilesHashed(digests=digests))

    def ask(self, resolved: Resolved) -> Answered:
        """What is known of these jobs; those that need no work are open no more."""
        reply = self._link.ask(resolved)
        assert isinstance(reply, Answered)  # noqa: S101  (each question has its reply)
        self._open -= reply.job_ids
        return reply

    def enter(self, job_ids: Iterable[int], stage: Stage) -> None:
        """The work is now that of the open ones of ``job_ids``, and of no others."""
        ids = self.open(job_ids)
        if ids and (ids, stage) != self._entered:
            self._entered = (ids, stage)
            log.info("%s: %s", ", ".join(f"j{n}" for n in ids), stage)
            self._link.send(Entered(job_ids=ids, stage=stage))

    def done(self, message: Measured) -> None:
        self._open.discard(message.job_id)
        self._link.send(message)

    @contextlib.contextmanager
    def failing(self, job_ids: Iterable[int]) -> Iterator[None]:
        """An error within fails those of ``job_ids`` that are still open, and no others."""
        try:
            yield
        except Exception as error:
            translated = error if isinstance(error, JobError) else _unforeseen(error)
            self.failed(job_ids, translated)

    def confirm(self, source: LocalSource) -> None:
        """Raises SourceChanged, after it failed every open job, where the source is not what it was: what one of them
        measured of it could be set beside what another did."""
        try:
            source.confirm()
        except SourceChanged as error:
            self.failed(self.open(), error)
            raise

    def failed(self, job_ids: Iterable[int], error: JobError) -> None:
        """A fault that spoils the device is charged to the first of them: the others may be innocent."""
        for job_id in self.open(job_ids):
            if job_id not in self._open:
                return
            log.error("j%s: %s: %s", job_id, error.kind, error)
            self._open.discard(job_id)
            needed_bytes = error.needed_bytes if isinstance(error, DiskFull) else None
            self._link.send(Failed(job_id=job_id, kind=error.kind, message=str(error), needed_bytes=needed_bytes))
            self.leave_spoilt_device(error)

    def leave_spoilt_device(self, error: JobError) -> None:
        """Leave what is open to a new runner, which begins with the whole device."""
        if isinstance(error, (CudaOom, DeviceError)):
            self._open.clear()


def _unforeseen(error: Exception) -> JobError:
    traceback.print_exc()
    # A sick device may fail anything that touches it: importing bitsandbytes does.
    meant = as_job_error(error)
    return meant if isinstance(meant, (CudaOom, DeviceError, DiskFull, HostOom)) else InternalError(one_line(error))
