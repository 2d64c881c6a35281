"""Record outcomes in the database. If it does not accept one, spool it to disk and record it later.

If the disk is full too, as with an embedded database on the same disk, outcomes stay in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from qbatch.core.domain import Protocol, format_job_id
from qbatch.core.errors import (
    DatabaseRefused,
    DatabaseUnreachable,
    DiskFull,
    InternalError,
    JobError,
    WrongDatabase,
    job_error,
    one_line,
)
from qbatch.core.measured.measurement import Measurement
from qbatch.core.search.finished_search import FinishedSearch
from qbatch.core.settings import Settings
from qbatch.models_db import checkpoints, jobs
from qbatch.models_db.jobs import Token
from qbatch.models_db.schema_fit import explain
from qbatch.models_db.session import Database
from qbatch.worker.checkpoints.published import Published
from qbatch.worker.serving.spool import Spool, Spooled

log = logging.getLogger("qbatch.worker")


class _OfAnotherDatabase(Exception):
    """The outcome belongs to a job of another database, which was in use here before this one."""


class Recorder:
    """Records all outcomes of a worker. Recording the same outcome twice changes nothing."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._spool = Spool(settings.spool)
        self._in_memory: dict[Token, Spooled] = {}
        self._recorded: set[int] = set()
        # Files that cannot be removed from the spool and were reported.
        self._stuck: set[Path] = set()

    def succeed(self, token: Token, measurement: Measurement, protocol: Protocol, published: Published | None) -> None:
        self._record(
            token,
            {
                "outcome": "succeeded",
                "measurement": measurement.to_json(),
                "protocol": protocol.to_json(),
                "checkpoint": _as_json(published) if published is not None else None,
            },
        )

    def searched(self, token: Token, key: str, found: FinishedSearch) -> None:
        """Record what a search found."""
        self._record(token, {"outcome": "searched", "key": key, "search": found.to_json()})

    def note_checkpoint(self, job_id: int, published: Published) -> None:
        """Record a checkpoint before its result, so that ``verify`` finds it even if the benchmark fails."""
        try:
            with self._database.write() as session:
                self._database.require_own(session)
                checkpoints.record(session, job_id=job_id, **_as_json(published))
        except DatabaseUnreachable as error:
            log.warning("%s; the checkpoint of j%s will be recorded with its outcome", error, job_id)

    def fail(self, token: Token, error: JobError, published: Published | None = None) -> None:
        """Record a failure. ``published`` is the checkpoint that the attempt had published before it failed."""
        needed_bytes = error.needed_bytes if isinstance(error, DiskFull) else None
        outcome = {"outcome": "failed", "kind": error.kind, "message": str(error), "needed_bytes": needed_bytes}
        self._record(token, outcome | {"checkpoint": _as_json(published) if published is not None else None})

    def hand_back(self, tokens: Sequence[Token], *, alone: bool) -> None:
        try:
            with self._database.write() as session:
                self._database.require_same(session)
                jobs.hand_back(session, tokens, alone=alone)
        except DatabaseUnreachable as error:
            for token in tokens:
                self._keep(self._spooled(token, {"outcome": "handed_back", "alone": alone}), error)

    def take_recorded(self) -> frozenset[int]:
        """The jobs whose outcomes were recorded since the last call, those from the spool included."""
        taken, self._recorded = self._recorded, set()
        return frozenset(taken)

    @property
    def has_in_memory(self) -> bool:
        """Whether there are outcomes that neither the database nor the disk has accepted yet."""
        return bool(self._in_memory)

    def lost(self) -> list[int]:
        """The jobs whose outcomes are only in memory, and are lost when this process ends."""
        return sorted(job_id for job_id, _ in self._in_memory)

    def replay(self) -> None:
        """Record what was spooled or kept in memory. Raises DatabaseUnreachable; the rest then stays where it is.

        All workers of a machine share the spool, and several may replay it at once; each outcome still counts once. An
        outcome that the right database refuses is set aside, because it would otherwise stop every worker of the
        machine. If files cannot be removed from the folder, they are read again each time, which is harmless.
        """
        for kept in list(self._in_memory.values()):
            self._replay_from_memory(kept)
        for path in self._spool.waiting():
            try:
                spooled = self._spool.read(path)
            except FileNotFoundError:  # another worker has recorded it
                continue
            except OSError as error:
                log.warning("%s; trying to read it again later", error)
                continue
            except ValueError as error:
                self._set_aside(path, None, error)
                continue
            if spooled is not None:
                self._replay(path, spooled)

    def _replay(self, path: Path, spooled: Spooled) -> None:
        try:
            self._write(spooled)
        except DatabaseRefused as error:
            cause = explain(self._database, error)
            if cause is not error:
                raise cause from error
            self._set_aside(path, spooled, error)
        except DatabaseUnreachable:
            raise
        except Exception as error:
            self._set_aside(path, spooled, error)
        else:
            if self._remove(path):
                log.info("j%s: recorded the spooled outcome of attempt %s", *spooled.token)

    def _record(self, token: Token, outcome: dict[str, Any]) -> None:
        spooled = self._spooled(token, outcome)
        try:
            self._write(spooled)
        except DatabaseUnreachable as error:
            self._keep(spooled, error)
            if isinstance(error, DatabaseRefused | WrongDatabase):
                self._mark_work_as_over(token)
        except Exception as error:
            # Keep the measurement, whatever went wrong. ``replay`` tries again and decides what to do.
            log.exception("the outcome of j%s could not be recorded", token[0])
            self._keep(spooled, error)

    def _mark_work_as_over(self, token: Token) -> None:
        """Note that the job's work is over, if the database accepts notes.

        The outcome is safe in the spool, so the job must not be charged with a failure if its lease expires before the
        outcome is recorded.
        """
        try:
            with self._database.write() as session:
                self._database.require_same(session)
                jobs.note(session, token, work_started=False)
        except DatabaseUnreachable as error:
            log.warning("%s; it is not recorded that the work of j%s is over", error, token[0])

    def _spooled(self, token: Token, outcome: dict[str, Any]) -> Spooled:
        return Spooled(token=token, database=self._database.identity, outcome=outcome)

    def _keep(self, spooled: Spooled, error: Exception) -> None:
        job = format_job_id(spooled.token[0])
        try:
            path = self._spool.put(spooled)
            log.warning("%s: %s; its outcome is spooled in %s", job, error, path)
        except OSError as full:
            log.warning("%s: %s; %s; its outcome is kept in memory", job, error, full)
            self._in_memory[spooled.token] = spooled

    def _replay_from_memory(self, spooled: Spooled) -> None:
        try:
            self._write(spooled)
        except DatabaseUnreachable as error:
            with suppress(OSError):
                self._spool.put(spooled)
                self._in_memory.pop(spooled.token, None)
            if isinstance(error, DatabaseRefused):
                return
            raise
        except Exception:
            log.exception("the outcome of j%s could not be recorded", spooled.token[0])
            with suppress(OSError):
                self._spool.put(spooled)
                self._in_memory.pop(spooled.token, None)
            return
        # Two threads of a worker may do this at once.
        self._in_memory.pop(spooled.token, None)

    def _set_aside(self, path: Path, spooled: Spooled | None, error: Exception) -> None:
        """Set aside an outcome that cannot be recorded, and name its file in the job's row."""
        handed_back = spooled is not None and spooled.outcome["outcome"] == "handed_back"
        if handed_back and isinstance(error, _OfAnotherDatabase):
            self._remove(path)  # it concerns no job of this database, and contains no measurement
            return
        why = str(error) if isinstance(error, DatabaseRefused | _OfAnotherDatabase) else one_line(error)
        try:
            aside = self._spool.set_aside(path)
        except FileNotFoundError:  # another worker has set it aside
            return
        except OSError as refused:
            if path in self._stuck:
                return
            aside = path
            self._stuck.add(path)
            log.error(
                "%s cannot be recorded (%s) or set aside (%s): make %s writable; it is tried again and again",
                path, why, refused.strerror, path.parent,
            )  # fmt: skip
        else:
            log.error(
                "%s cannot be recorded: %s; it is set aside as %s; to try again, give it its former name back",
                path,
                why,
                aside,
            )
        if spooled is None or handed_back or isinstance(error, _OfAnotherDatabase):
            return
        failure = InternalError(f"its outcome could not be recorded: {why}; it is kept in {aside}")
        try:
            with self._database.write() as session:
                self._database.require_own(session)
                self._fail(session, spooled.token, failure)
        except DatabaseUnreachable as unreachable:
            log.warning("%s; j%s will be taken back when its lease expires", unreachable, spooled.token[0])

    def _remove(self, path: Path) -> bool:
        """Remove a recorded file; return whether it is gone. If it stays, recording it again changes nothing."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            if path not in self._stuck:
                self._stuck.add(path)
                log.error(
                    "%s is recorded but cannot be removed: %s; make %s writable", path, error.strerror, path.parent
                )
            return False
        return True

    def _fail(self, session: Session, token: Token, error: JobError) -> None:
        jobs.fail(session, token, error, limits=self._settings.retry_limits, lease_s=self._settings.lease_s)

    def _write(self, spooled: Spooled) -> None:
        """Write an outcome to the database. Raises DatabaseUnreachable, or anything if the outcome is malformed."""
        token, outcome = spooled.token, spooled.outcome
        with self._database.write() as session:
            self._database.require_own(session)
            if spooled.database not in (None, self._database.identity):
                raise _OfAnotherDatabase("it belongs to another database, which was in use here before this one")
            if outcome["outcome"] == "handed_back":
                jobs.hand_back(session, [token], alone=outcome["alone"])
                return
            self._recorded.add(token[0])
            if outcome["outcome"] == "searched":
                jobs.searched(session, token, outcome["key"], FinishedSearch.from_json(outcome["search"]))
                return
            checkpoint = outcome.get("checkpoint")
            if checkpoint is not None:
                checkpoints.record(session, job_id=token[0], **checkpoint)
            if outcome["outcome"] == "failed":
                error = job_error(outcome["kind"], outcome["message"], outcome.get("needed_bytes"))
                self._fail(session, token, error)
                return
            jobs.succeed(
                session,
                token,
                Measurement.from_json(outcome["measurement"]),
                protocol=Protocol.from_json(outcome["protocol"]),
                checkpoint_path=checkpoint["path"] if checkpoint is not None else None,
            )


def _as_json(published: Published) -> dict[str, Any]:
    return {
        "key": published.key,
        "path": published.path,
        "root_sha256": published.root_sha256,
        "disk_bytes": published.disk_bytes,
        "versions": dict(published.versions),
    }
