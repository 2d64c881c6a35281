"""One bundle's runner, watched: leases renewed, outcomes recorded, killed when it must be."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
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
from qbatch.core.settings import Settings
from qbatch.models_db import file_digests, jobs
from qbatch.models_db.batches import text_content
from qbatch.models_db.database_id import database_id
from qbatch.models_db.jobs import Token
from qbatch.models_db.schema_fit import explain
from qbatch.models_db.session import Database
from qbatch.scheduler.stop import Stop
from qbatch.worker.checkpoints.publish import Published
from qbatch.worker.files.staging import folder_of, unstage
from qbatch.worker.runner import process as runner
from qbatch.worker.runner.messages import (
    Answered,
    CheckpointReady,
    CheckpointVerified,
    Ended,
    Entered,
    Failed,
    FilesHashed,
    FilesKnown,
    FilesSeen,
    Measured,
    Order,
    Progressed,
    Pulse,
    Reply,
    Resolved,
    RunnerMessage,
)
from qbatch.worker.serving.answers import Answers
from qbatch.worker.serving.leaving import Leaving
from qbatch.worker.serving.recorder import Recorder
from qbatch.worker.sources.fetch import SourcePolicy

log = logging.getLogger("qbatch.worker")

_POLL_S = 0.2
_PULSE_S = 1.0
_LOOK_S = 1.5
# Before each try to start a runner. A killed forkserver's pipes close before it counts as dead, and only a dead one is
# replaced.
_FORK_PAUSES_S = (0.0, 0.1, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """A worker's fixed surroundings. ``staging`` is its own folder of the storage's."""

    database: Database
    settings: Settings
    recorder: Recorder
    worker_id: int
    device_kind: DeviceKind
    device_name: str
    staging: Path
    forkserver: ForkServerContext
    stopping: Stop
    leaving: Leaving = field(default_factory=Leaving)


class _Pulsing:
    """The supervisor's end of the pipe, with a pulse on it from a thread of its own.

    While the database blocks the supervisor, its runner must not take the worker for dead.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse")
        self._thread.start()

    def send(self, message: Reply | Pulse) -> bool:
        """False where the runner hears no more; what it said before may still be unread."""
        try:
            with self._lock:
                self.connection.send(message)
        except OSError:
            return False
        return True

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(_PULSE_S) and self.send(Pulse()):
            pass


class _NoRunner(Exception):
    """The forkserver dies over every start."""


class Supervisor:
    """Sees one bundle through. Use once."""

    def __init__(self, station: WorkerContext, claims: Sequence[Claim]) -> None:
        self._station = station
        self._claims = {claim.job_id: claim for claim in claims}
        self._open = set(self._claims)
        self._published: dict[int, Published] = {}
        self._answers = Answers(station.database, station.settings.storage, station.device_name, self._claims)
        self._active: tuple[int, ...] = ()
        self._has_begun = False
        self._active_s = dict.fromkeys(self._claims, 0.0)
        self.failed: list[int] = []

    def run(self) -> None:
        """Until every claimed job is recorded or handed back."""
        try:
            process, connection = self._start()
            pulse = _Pulsing(connection)
            try:
                self._watch(process, pulse)
            finally:
                # In this order: a pulse into a full pipe ends with the runner.
                _kill(process)
                pulse.end()
                connection.close()
                self._clear_staging()
        except WrongDatabase as error:
            self._station.leaving.because(error)
            log.warning("%s; %s go back to the queue", error, _names(self._open))
        except DatabaseRefused as error:
            self._give_up(error)
        except DatabaseUnreachable as error:
            log.warning("%s; %s go back to the queue", error, _names(self._open))
        except _NoRunner as error:
            # No work had begun, so nobody is charged. The launcher starts another worker, which may do better.
            log.error("%s; this worker ends, and %s go back to the queue", error, _names(self._open))
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            self._give_up(error)
        finally:
            self._hand_back(alone=False)

    def _give_up(self, error: Exception) -> None:
        """Handed back, what a defect of ours or a row of theirs stops would come round for ever."""
        log.exception("supervising %s", _names(self._open))
        for job_id in sorted(self._open):
            self._fail(job_id, InternalError(one_line(error)))

    def _start(self) -> tuple[BaseProcess, Connection]:
        """Raises _NoRunner, DatabaseUnreachable: of these WrongDatabase too, and DatabaseRefused for what these jobs
        ask for."""
        try:
            order = self._order()
        except DatabaseRefused as error:
            raise explain(self._station.database, error) from error
        for pause_s in _FORK_PAUSES_S:
            time.sleep(pause_s)
            try:
                return self._fork(order)
            except (EOFError, OSError) as error:
                died = one_line(error)
                log.warning("the forkserver died (%s)", died)
        raise _NoRunner(f"no runner can be started: {died}")

    def _fork(self, order: Order) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._station.forkserver.Pipe()
        with theirs:
            process = self._station.forkserver.Process(target=runner.run, args=(order, theirs), daemon=True)
            try:
                process.start()
            except BaseException:
                # It may run all the same, unknown to us: it leaves when its pipe closes.
                ours.close()
                raise
        return process, ours

    def _order(self) -> Order:
        station, settings = self._station, self._station.settings
        hashes = {sha256 for claim in self._claims.values() for sha256 in claim.spec.protocol.text_hashes}
        with station.database.read() as session:
            station.database.require_same(session)
            texts = {sha256: text_content(session, sha256) for sha256 in hashes}
            logs = settings.logs_of(database_id(session))
        return Order(
            claims=tuple(self._claims.values()),
            texts=texts,
            device_kind=station.device_kind,
            device_name=station.device_name,
            storage=settings.storage,
            staging=station.staging,
            cache=settings.cache,
            cache_bytes=settings.cache_bytes,
            doors=SourcePolicy(
                roots=settings.allowed_roots,
                trusted=settings.trust_remote_code,
                # The jobs of a bundle are of one batch, and so of one mind.
                allow_pickle=all(claim.spec.allow_pickle for claim in self._claims.values()),
            ),
            lease_s=settings.lease_s,
            log_path=logs / self._log_name(),
        )

    def _log_name(self) -> str:
        first = min(self._claims)
        return f"j{first}-{self._claims[first].attempt}.log"

    def _watch(self, process: BaseProcess, pulse: _Pulsing) -> None:
        settings = self._station.settings
        beat_at = look_at = last = time.monotonic()
        while True:
            try:
                message = pulse.connection.recv() if pulse.connection.poll(_POLL_S) else None
            except (EOFError, OSError):
                self._runner_died(process)
                return
            if message is not None and self._handle(message, pulse):
                return
            now = time.monotonic()
            for job_id in self._active:
                self._active_s[job_id] += now - last
            last = now
            if self._station.stopping.is_set():
                log.info("stopping: %s go back to the queue", _names(self._open))
                return
            if self._station.leaving.why is not None and not self._has_begun:
                log.info("leaving: %s have not begun, and go back to the queue", _names(self._open))
                return
            if self._over_time():
                return
            if now >= look_at:
                beats = now >= beat_at
                if beats:
                    beat_at = now + settings.heartbeat_s
                look_at = now + _LOOK_S
                if not self._still_ours(renew=beats):
                    return

    def _handle(self, message: RunnerMessage, pulse: _Pulsing) -> bool:
        """Act on what the runner says; True once it has ended."""
        match message:
            case Resolved():
                pulse.send(self._answer(message))
            case FilesSeen():
                pulse.send(self._known(message))
            case FilesHashed():
                self._remember(message)
            case CheckpointVerified():
                self._answers.verified(message)
            case Entered():
                self._entered(message)
            case Progressed():
                self._progressed(message)
            case CheckpointReady():
                self._published[message.job_id] = message.published
                self._station.recorder.note_checkpoint(message.job_id, message.published)
            case Measured():
                self._station.recorder.succeed(
                    self._token(message.job_id),
                    message.measurement,
                    message.protocol,
                    self._published.get(message.job_id),
                )
                self._close(message.job_id)
            case Failed():
                self._fail(message.job_id, job_error(message.kind, message.message, message.needed_bytes))
            case Ended():
                return True
        return False

    def _answer(self, resolved: Resolved) -> Answered:
        answered = self._answers.find(resolved)
        for job_id in answered.job_ids:
            self._close(job_id)
        return answered

    def _known(self, seen: FilesSeen) -> FilesKnown:
        try:
            with self._station.database.read() as session:
                self._station.database.require_own(session)
                return FilesKnown(digests=file_digests.known(session, seen.stats))
        except DatabaseUnreachable as error:
            log.warning("%s; everything is hashed", error)
            return FilesKnown(digests={})

    def _remember(self, hashed: FilesHashed) -> None:
        try:
            with self._station.database.write() as session:
                self._station.database.require_own(session)
                file_digests.remember(session, hashed.digests)
        except DatabaseUnreachable as error:
            log.warning("%s; the files will be hashed again", error)

    def _entered(self, message: Entered) -> None:
        self._active = tuple(job_id for job_id in message.job_ids if job_id in self._open)
        # What was fetched stays in the machine's cache.
        self._has_begun = self._has_begun or message.stage is not Stage.FETCHING
        self._write_notes(
            [(job_id, {"stage": message.stage, "work_started": True}) for job_id in self._active]
            + [(job_id, {"work_started": False}) for job_id in self._open.difference(self._active)]
        )

    def _progressed(self, message: Progressed) -> None:
        progress = {
            "bytes_read": message.bytes_read,
            "bytes_written": message.bytes_written,
            "bytes_total": message.bytes_total,
        }
        self._write_notes([(job_id, {"progress": progress}) for job_id in message.job_ids if job_id in self._open])

    def _write_notes(self, notes: Sequence[tuple[int, dict[str, object]]]) -> None:
        try:
            with self._station.database.write() as session:
                self._station.database.require_same(session)
                # In id order, as everyone locks them.
                for job_id, values in sorted(notes, key=lambda note: note[0]):
                    jobs.note(session, self._token(job_id), **values)  # type: ignore[arg-type]
        except DatabaseUnreachable as error:
            # Only what people watch is lost; leases and outcomes have their own care.
            log.warning("%s; progress is not recorded", error)

    def _still_ours(self, *, renew: bool) -> bool:
        """Whether every open job is still held; a job cancelled or taken back ends the runner."""
        tokens = [self._token(job_id) for job_id in self._open]
        database = self._station.database
        try:
            if renew:
                with database.write() as session:
                    database.require_same(session)
                    held = jobs.heartbeat(session, tokens, self._station.settings.lease_s)
            else:
                with database.read() as session:
                    database.require_same(session)
                    held = jobs.held(session, tokens)
        except DatabaseUnreachable as error:
            log.warning("%s; the runner goes on", error)
            return True
        lost = self._open - held
        if not lost:
            return True
        log.info("%s cancelled or taken back; stopping the runner", _names(lost))
        self._open -= lost
        return False

    def _over_time(self) -> bool:
        over = [job_id for job_id in self._active if job_id in self._open and self._is_over_time(job_id)]
        for job_id in over:
            self._fail(job_id, JobTimeout(f"over its time limit of {self._claims[job_id].time_limit_s:g} s"))
        return bool(over)

    def _is_over_time(self, job_id: int) -> bool:
        limit_s = self._claims[job_id].time_limit_s
        return limit_s is not None and self._active_s[job_id] > limit_s

    def _runner_died(self, process: BaseProcess) -> None:
        """Charge the jobs that it was working on; the others go back, each alone, so that a poison job is found."""
        process.join(10.0)
        code = process.exitcode
        for job_id in [job_id for job_id in self._active if job_id in self._open]:
            self._fail(job_id, _death(code))
        self._hand_back(alone=True)

    def _fail(self, job_id: int, error: JobError) -> None:
        self._station.recorder.fail(self._token(job_id), error, self._published.get(job_id))
        self._close(job_id)
        self.failed.append(job_id)

    def _close(self, job_id: int) -> None:
        self._open.discard(job_id)
        self._active = tuple(other for other in self._active if other != job_id)

    def _hand_back(self, *, alone: bool) -> None:
        if self._open:
            self._station.recorder.hand_back([self._token(job_id) for job_id in sorted(self._open)], alone=alone)
        self._open.clear()

    def _clear_staging(self) -> None:
        """A runner that was killed left its files."""
        for job_id, claim in self._claims.items():
            try:
                unstage(folder_of(self._station.staging, job_id, claim.attempt))
            except StorageError as error:
                log.warning("j%s: %s", job_id, error)

    def _token(self, job_id: int) -> Token:
        return (job_id, self._claims[job_id].attempt)


def _death(code: int | None) -> JobError:
    if code == -signal.SIGKILL:
        return HostOom("the runner was killed (SIGKILL): out of host memory, or by hand")
    if code is not None and code < 0:
        return WorkerLost(f"the runner died of {signal.Signals(-code).name}")
    return WorkerLost(f"the runner ended with code {code} without a word")


def _kill(process: BaseProcess) -> None:
    if process.is_alive():
        process.kill()
    process.join()


def _names(job_ids: set[int]) -> str:
    return ", ".join(f"j{job_id}" for job_id in sorted(job_ids)) or "no jobs"
