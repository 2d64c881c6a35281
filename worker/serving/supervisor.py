"""Supervise the runner of a bundle: renew leases, record outcomes, and kill the runner when necessary."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from qbatch.core.domain import Claim, DeviceKind, Stage
from qbatch.core.errors import (
    DatabaseRefused,
    DatabaseUnreachable,
    HostOom,
    InternalError,
    JobError,
    JobTimeout,
    StorageError,
    WorkerLost,
    WrongDatabase,
    job_error,
    one_line,
)
from qbatch.core.job_log import runner_log
from qbatch.core.job_progress import JobProgress
from qbatch.core.settings import Settings
from qbatch.models_db import jobs
from qbatch.models_db.batches import text_content
from qbatch.models_db.database_id import database_id
from qbatch.models_db.jobs import Token
from qbatch.models_db.schema_fit import explain
from qbatch.models_db.session import Database
from qbatch.scheduler.stop import Stop
from qbatch.worker.checkpoints.published import Published
from qbatch.worker.files.staging import folder_of, unstage
from qbatch.worker.runner.messages import (
    Answered,
    CheckpointReady,
    CheckpointVerified,
    Ended,
    Entered,
    Failed,
    FetchingAhead,
    FilesHashed,
    FilesKnown,
    FilesSeen,
    Measured,
    MeasurementsOver,
    NothingTimed,
    Order,
    Progressed,
    Resolved,
    RunnerMessage,
    Searched,
    Stepped,
)
from qbatch.worker.serving.answers import Answers
from qbatch.worker.serving.known_files import KnownFiles
from qbatch.worker.serving.next_source import NextSource
from qbatch.worker.serving.pulsing_pipe import PulsingPipe
from qbatch.worker.serving.recorder import Recorder
from qbatch.worker.serving.runners import NoRunner, Runners
from qbatch.worker.serving.running_progress import RunningProgress
from qbatch.worker.serving.shutdown import Shutdown
from qbatch.worker.sources.source_policy import SourcePolicy

log = logging.getLogger("qbatch.worker")

_POLL_S = 0.2
_CHECK_S = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """What a worker needs to run bundles; fixed for its lifetime. ``staging`` is its own folder on the storage."""

    database: Database
    settings: Settings
    recorder: Recorder
    worker_id: int
    device_kind: DeviceKind
    device_name: str
    staging: Path
    runners: Runners
    next_source: NextSource
    stopping: Stop
    shutdown: Shutdown = field(default_factory=Shutdown)
    device_uuid: str | None = None


class Supervisor:
    """Runs one bundle. Use it once."""

    def __init__(self, context: WorkerContext, claims: Sequence[Claim]) -> None:
        self._context = context
        self._claims = {claim.job_id: claim for claim in claims}
        self._open = set(self._claims)
        self._published: dict[int, Published] = {}
        self._answers = Answers(context.database, context.settings.storage, context.device_name, self._claims)
        self._files = KnownFiles(context.database)
        self._active: tuple[int, ...] = ()
        self._has_begun = False
        self._active_s = dict.fromkeys(self._claims, 0.0)
        self._progress = RunningProgress()
        self.failed: list[int] = []

    def run(self) -> None:
        """Run the bundle until every claimed job has a recorded outcome or is returned to the queue."""
        try:
            process, connection = self._start()
            pulse = PulsingPipe(connection)
            try:
                self._context.next_source.look()
                self._tell_of_fetch(pulse)
                self._watch(process, pulse)
            finally:
                # In this order: a pulse that is blocked on a full pipe ends when the runner does.
                _kill(process)
                pulse.end()
                connection.close()
                self._context.next_source.resume()
                self._clear_staging()
        except WrongDatabase as error:
            self._context.shutdown.request(error)
            log.warning("%s; returning %s to the queue", error, _names(self._open))
        except DatabaseRefused as error:
            self._fail_all(error)
        except DatabaseUnreachable as error:
            log.warning("%s; returning %s to the queue", error, _names(self._open))
        except NoRunner as error:
            # No work had begun, so no job is charged. The launcher starts another worker, which may be able to.
            log.error("%s; this worker ends, returning %s to the queue", error, _names(self._open))
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            self._fail_all(error)
        finally:
            self._hand_back(alone=False)

    def _fail_all(self, error: Exception) -> None:
        """Fail the open jobs. If they were returned to the queue, the same defect would stop them again and again."""
        log.exception("supervising %s failed", _names(self._open))
        for job_id in sorted(self._open):
            self._fail(job_id, InternalError(one_line(error)))

    def _start(self) -> tuple[BaseProcess, Connection]:
        """Start the runner.

        Raises NoRunner or DatabaseUnreachable. Its subclasses are possible too: WrongDatabase, and DatabaseRefused if
        the database refuses what these jobs need.
        """
        try:
            order = self._order()
        except DatabaseRefused as error:
            raise explain(self._context.database, error) from error
        return self._context.runners.start(order)

    def _order(self) -> Order:
        context, settings = self._context, self._context.settings
        first = min(self._claims)
        hashes = {sha256 for claim in self._claims.values() for sha256 in claim.spec.text_hashes}
        with context.database.read() as session:
            context.database.require_same(session)
            texts = {sha256: text_content(session, sha256) for sha256 in hashes}
            database = database_id(session)
        logs = settings.logs_of(database)
        return Order(
            claims=tuple(self._claims.values()),
            texts=texts,
            device_kind=context.device_kind,
            device_name=context.device_name,
            storage=settings.storage,
            staging=context.staging,
            cache=settings.cache,
            cache_bytes=settings.cache_bytes,
            policy=SourcePolicy(
                roots=settings.allowed_roots,
                trusted=settings.trust_remote_code,
                # All jobs of a bundle come from the same submit, so they agree.
                allow_pickle=all(claim.spec.allow_pickle for claim in self._claims.values()),
            ),
            lease_s=settings.lease_s,
            log_path=runner_log(logs, first, self._claims[first].attempt),
            device_uuid=context.device_uuid,
            database=database,
        )

    def _watch(self, process: BaseProcess, pulse: PulsingPipe) -> None:
        settings = self._context.settings
        beat_at = check_at = last = time.monotonic()
        while True:
            try:
                message = pulse.connection.recv() if pulse.connection.poll(_POLL_S) else None
            except (EOFError, OSError):
                self._runner_died(process)
                return
            if message is not None and self._handle(message, pulse):
                return
            if self._progress.is_due():
                self._write_notes(self._notes_of(self._progress.take()))
            self._context.next_source.serve()
            now = time.monotonic()
            for job_id in self._active:
                self._active_s[job_id] += now - last
            last = now
            if self._context.stopping.is_set():
                log.info("stopping: returning %s to the queue", _names(self._open))
                return
            if self._context.shutdown.reason is not None and not self._has_begun:
                log.info("stopping: returning %s, whose work has not begun, to the queue", _names(self._open))
                return
            if self._over_time():
                return
            if now >= check_at:
                beats = now >= beat_at
                if beats:
                    beat_at = now + settings.heartbeat_s
                check_at = now + _CHECK_S
                self._context.next_source.look()
                if not self._still_ours(renew=beats):
                    return

    def _handle(self, message: RunnerMessage, pulse: PulsingPipe) -> bool:
        """Act on a message from the runner. Returns True if it has ended."""
        match message:
            case Resolved():
                pulse.send(self._answer(message))
            case FilesSeen():
                pulse.send(FilesKnown(digests=self._files.known(message)))
            case FilesHashed():
                self._files.remember(message)
            case CheckpointVerified():
                self._answers.verified(message)
            case Entered():
                self._entered(message)
            case Progressed():
                self._progress.moved(message)
            case Stepped():
                self._progress.stepped(message)
            case CheckpointReady():
                self._published[message.job_id] = message.published
                self._context.recorder.note_checkpoint(message.job_id, message.published)
            case Measured():
                self._context.recorder.succeed(
                    self._token(message.job_id),
                    message.measurement,
                    message.protocol,
                    self._published.get(message.job_id),
                )
                self._close(message.job_id)
            case Searched():
                self._context.recorder.searched(self._token(message.job_id), message.key, message.found)
                self._close(message.job_id)
            case Failed():
                self._fail(message.job_id, job_error(message.kind, message.message, message.needed_bytes))
            case NothingTimed():
                self._context.next_source.begin()
                self._tell_of_fetch(pulse)
            case MeasurementsOver():
                # The next runner prepares itself while this one confirms its files and ends.
                self._context.runners.stand_by()
            case Ended():
                return True
        return False

    def _tell_of_fetch(self, pulse: PulsingPipe) -> None:
        if (pid := self._context.next_source.pid) is not None:
            pulse.send(FetchingAhead(pid=pid))

    def _answer(self, resolved: Resolved) -> Answered:
        answered = self._answers.find(resolved)
        for job_id in answered.job_ids:
            self._close(job_id)
        return answered

    def _entered(self, message: Entered) -> None:
        self._active = tuple(job_id for job_id in message.job_ids if job_id in self._open)
        # Fetching does not count as work: what was fetched stays in the cache of this machine.
        self._has_begun = self._has_begun or message.stage is not Stage.FETCHING
        # What was still to be recorded of the stage before counts: its last bytes.
        before = self._progress.take()
        self._progress.entered(self._active, message.stage)
        notes = self._notes_of(before | self._progress.take())
        for job_id in self._open:
            is_active = job_id in self._active
            notes.setdefault(job_id, {}).update({"stage": message.stage} if is_active else {}, work_started=is_active)
        self._write_notes(notes)

    def _notes_of(self, progress: Mapping[int, JobProgress]) -> dict[int, dict[str, object]]:
        return {job_id: {"progress": one.to_json()} for job_id, one in progress.items() if job_id in self._open}

    def _write_notes(self, notes: Mapping[int, dict[str, object]]) -> None:
        try:
            with self._context.database.write() as session:
                self._context.database.require_same(session)
                # Rows are locked in the order of their ids everywhere, to avoid deadlocks.
                for job_id, values in sorted(notes.items()):
                    jobs.note(session, self._token(job_id), **values)  # type: ignore[arg-type]
        except DatabaseUnreachable as error:
            # Only the progress display suffers; leases and outcomes are handled separately.
            log.warning("%s; progress is not recorded", error)

    def _still_ours(self, *, renew: bool) -> bool:
        """Whether this worker still holds every open job. If one was cancelled or taken back, the runner must end."""
        tokens = [self._token(job_id) for job_id in self._open]
        database = self._context.database
        try:
            if renew:
                with database.write() as session:
                    database.require_same(session)
                    held = jobs.heartbeat(session, tokens, self._context.settings.lease_s)
            else:
                with database.read() as session:
                    database.require_same(session)
                    held = jobs.held(session, tokens)
        except DatabaseUnreachable as error:
            log.warning("%s; the runner continues", error)
            return True
        lost = self._open - held
        if not lost:
            return True
        log.info("stopping the runner: %s cancelled or taken back", _names(lost))
        self._open -= lost
        return False

    def _over_time(self) -> bool:
        over = [job_id for job_id in self._active if job_id in self._open and self._is_over_time(job_id)]
        for job_id in over:
            self._fail(job_id, JobTimeout(f"exceeded its time limit of {self._claims[job_id].time_limit_s:g} s"))
        return bool(over)

    def _is_over_time(self, job_id: int) -> bool:
        limit_s = self._claims[job_id].time_limit_s
        return limit_s is not None and self._active_s[job_id] > limit_s

    def _runner_died(self, process: BaseProcess) -> None:
        """Fail the jobs that the runner was working on, and return the others to the queue.

        Each of those is sent alone, so that a job that kills its runner takes no others with it.
        """
        process.join(10.0)
        code = process.exitcode
        for job_id in [job_id for job_id in self._active if job_id in self._open]:
            self._fail(job_id, _death(code))
        self._hand_back(alone=True)

    def _fail(self, job_id: int, error: JobError) -> None:
        self._context.recorder.fail(self._token(job_id), error, self._published.get(job_id))
        self._close(job_id)
        self.failed.append(job_id)

    def _close(self, job_id: int) -> None:
        self._open.discard(job_id)
        self._active = tuple(other for other in self._active if other != job_id)

    def _hand_back(self, *, alone: bool) -> None:
        if self._open:
            self._context.recorder.hand_back([self._token(job_id) for job_id in sorted(self._open)], alone=alone)
        self._open.clear()

    def _clear_staging(self) -> None:
        """Remove the files that a killed runner has left."""
        for job_id, claim in self._claims.items():
            try:
                unstage(folder_of(self._context.staging, job_id, claim.attempt))
            except StorageError as error:
                log.warning("j%s: %s", job_id, error)

    def _token(self, job_id: int) -> Token:
        return (job_id, self._claims[job_id].attempt)


def _death(code: int | None) -> JobError:
    if code == -signal.SIGKILL:
        return HostOom("the runner was killed with SIGKILL: the host ran out of memory, or somebody killed it")
    if code is not None and code < 0:
        return WorkerLost(f"the runner was killed by {signal.Signals(-code).name}")
    return WorkerLost(f"the runner ended unexpectedly with exit code {code}")


def _kill(process: BaseProcess) -> None:
    if process.is_alive():
        process.kill()
    process.join()


def _names(job_ids: set[int]) -> str:
    return ", ".join(f"j{job_id}" for job_id in sorted(job_ids)) or "no jobs"
