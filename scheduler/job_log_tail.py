"""Read a job's log, and follow it while the job runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qbatch.core.domain import ENDED_STATES, format_job_id
from qbatch.core.errors import DatabaseRefused, DatabaseUnreachable, StorageUnavailable, UsageError, WrongDatabase
from qbatch.core.job_log import job_log
from qbatch.models_db.database_id import database_id
from qbatch.models_db.job_record import AttemptRecord, job_records
from qbatch.models_db.results import find_results
from qbatch.models_db.session import Database

_POLL_S = 0.5
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """How a job stands: its state, its error, its attempts, the newest one last."""

    job_id: int
    folder: Path
    state: str
    error: str | None
    reused_from: str | None
    attempts: tuple[AttemptRecord, ...]

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED_STATES

    @property
    def name(self) -> str:
        return format_job_id(self.job_id)

    def attempt(self, number: int | None) -> AttemptRecord | None:
        """The attempt of this number, or the newest one."""
        chosen = [one for one in self.attempts if number in (None, one.attempt)]
        return chosen[-1] if chosen else None

    def path(self, attempt: int) -> Path:
        return job_log(self.folder, self.job_id, attempt)


def status_of(database: Database, logs_of: Callable[[str], Path], job_id: int) -> JobStatus:
    """How an existing job stands. ``logs_of`` is that of the settings. Raises DatabaseUnreachable."""
    with database.read() as session:
        database.require_own(session)
        (record,) = job_records(session, [job_id])
        (row,) = find_results(session, job_ids=[job_id])
        folder = logs_of(database_id(session))
    return JobStatus(
        job_id=job_id,
        folder=folder,
        state=row.state,
        error=": ".join(filter(None, (row.error_kind, row.error_message))) or None,
        reused_from=row.reused_from,
        attempts=record.attempts,
    )


def require_attempt(status: JobStatus, number: int | None) -> AttemptRecord:
    """The attempt whose log is asked for. Raises UsageError, saying why there is none."""
    attempt = status.attempt(number)
    if attempt is not None:
        return attempt
    name = status.name
    if status.attempts:
        known = ", ".join(str(one.attempt) for one in status.attempts)
        raise UsageError(f"{name} has no attempt {number}; its attempts are {known}")
    if status.reused_from is not None:
        raise UsageError(f"{name} was answered by {status.reused_from}: see `qbatch logs {status.reused_from}`")
    if status.has_ended:
        reason = f": {status.error}" if status.error else ""
        raise UsageError(f"{name} has no log, because no worker had begun it when it {_ended(status.state)}{reason}")
    raise UsageError(f"no worker has begun {name}, so it has no log yet: `qbatch logs -f {name}` waits for it")


def _ended(state: str) -> str:
    return "was cancelled" if state == "cancelled" else state


@dataclass(slots=True)
class _File:
    """A log that grows. It may not exist yet."""

    path: Path
    offset: int = 0

    def read(self) -> bytes:
        """Whole lines that came since the last call. Raises StorageUnavailable if the file cannot be read."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                text = file.read(_CHUNK_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StorageUnavailable(f"the log {self.path} cannot be read: {error.strerror}") from error
        if len(text) == _CHUNK_BYTES:
            text = text[: text.rfind(b"\n") + 1] or text
        self.offset += len(text)
        return text

    def read_all(self) -> Iterator[bytes]:
        while text := self.read():
            yield text


def read_log(status: JobStatus, attempt: AttemptRecord) -> Iterator[bytes]:
    """What is in the log now, in pieces. Raises StorageUnavailable if there is no log."""
    path = status.path(attempt.attempt)
    file = _File(path)
    yield from file.read_all()
    if not file.offset:
        raise StorageUnavailable(
            f"there is no log {path}: this machine does not see the storage (QBATCH_STORAGE), its worker could not "
            "write there, `qbatch gc` or `qbatch prune` removed it, or an older version named it after the first job "
            "of the bundle"
        )


@dataclass(slots=True)
class Follower:
    """Follows a job from attempt to attempt until it has ended, or one attempt until that has.

    ``look`` returns how the job stands. ``say`` is told what is not in the log: which attempt begins, how one ended.
    """

    look: Callable[[], JobStatus]
    say: Callable[[str], None]
    number: int | None = None
    _shown: AttemptRecord | None = field(default=None, init=False)

    def follow(self) -> Iterator[bytes]:
        status = self.look()
        while True:
            attempt = self._next(status)
            if attempt is not None:
                yield from self._follow(status, attempt)
            elif status.has_ended or (self.number is not None and self._shown is not None):
                return
            time.sleep(_POLL_S)
            status = self._look_again(status)

    def _next(self, status: JobStatus) -> AttemptRecord | None:
        """The attempt to show now: None while there is none that was not shown."""
        attempt = status.attempt(self.number)
        if attempt is None or (self._shown is not None and attempt.attempt == self._shown.attempt):
            return None
        return attempt

    def _follow(self, status: JobStatus, attempt: AttemptRecord) -> Iterator[bytes]:
        self._shown = attempt
        self.say(f"{status.name}, attempt {attempt.attempt} on {attempt.worker}")
        file = _File(status.path(attempt.attempt))
        while True:
            # Looked up before the file is read: what the attempt wrote before it ended is there by then.
            status = self._look_again(status)
            now = status.attempt(attempt.attempt) or attempt
            yield from file.read_all()
            if now.ended_at is not None:
                self.say(describe_end(status, now))
                return
            time.sleep(_POLL_S)

    def _look_again(self, status: JobStatus) -> JobStatus:
        """How the job stands now, or stood when the database last answered."""
        try:
            return self.look()
        except (DatabaseRefused, WrongDatabase):
            raise
        except DatabaseUnreachable:
            return status


def describe_end(status: JobStatus, attempt: AttemptRecord) -> str:
    """How an attempt ended, which the log does not say if its runner was killed."""
    name = f"{status.name}, attempt {attempt.attempt}"
    if attempt.outcome is None:
        return f"{name} is running: `qbatch logs -f {status.name}` follows it"
    return f"{name} ended: {attempt.outcome}" + (f": {attempt.message}" if attempt.message else "")
