"""Outcomes go to the database; while it does not answer they are spooled to disk, and recorded later.

An embedded database shares its disk with the spool: while that is full, outcomes stay in memory.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from models_db import checkpoints, jobs
from models_db.domain import Measurement, Protocol
from models_db.errors import DatabaseUnreachable, DiskFull, JobError, job_error
from models_db.jobs import Token
from models_db.session import Database
from models_db.settings import Settings
from worker.checkpoint import Published

log = logging.getLogger("qbatch.worker")


class Recorder:
    """The only way an outcome leaves a worker. Recording the same outcome twice changes nothing."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._in_memory: dict[Token, dict[str, Any]] = {}

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

    def note_checkpoint(self, job_id: int, published: Published) -> None:
        """Remember a checkpoint before its result is there: where the benchmark fails, ``verify`` must find it too."""
        try:
            with self._database.write() as session:
                checkpoints.record(session, job_id=job_id, **_as_json(published))
        except DatabaseUnreachable as error:
            log.warning("%s; the checkpoint of j%s is recorded with its result", error, job_id)

    def fail(self, token: Token, error: JobError) -> None:
        needed_bytes = error.needed_bytes if isinstance(error, DiskFull) else None
        outcome = {"outcome": "failed", "kind": error.kind, "message": str(error), "needed_bytes": needed_bytes}
        self._record(token, outcome)

    def hand_back(self, tokens: Sequence[Token], *, alone: bool) -> None:
        try:
            with self._database.write() as session:
                jobs.hand_back(session, tokens, alone=alone)
        except DatabaseUnreachable as error:
            for token in tokens:
                self._keep(token, {"outcome": "handed_back", "alone": alone}, error)

    def replay(self) -> None:
        """Record what was spooled or kept in memory. Raises DatabaseUnreachable, with the rest still there.

        The workers of one machine share the spool: of several that replay at once each outcome counts once. What no
        worker of this version can record is set aside, or it would stop every worker of the machine for ever.
        """
        for token, outcome in list(self._in_memory.items()):
            self._replay_from_memory(token, outcome)
        for path in sorted(self._settings.spool.glob("*.json")):
            try:
                token, outcome = _read(path)
                self._write(token, outcome)
            except FileNotFoundError:  # another worker was first
                continue
            except DatabaseUnreachable:
                raise
            except Exception:
                log.exception("%s cannot be recorded; set aside", path)
                path.replace(path.with_suffix(".rejected"))
                continue
            path.unlink(missing_ok=True)
            log.info("j%s: the spooled outcome of attempt %s is recorded", *token)

    def _record(self, token: Token, outcome: dict[str, Any]) -> None:
        try:
            self._write(token, outcome)
        except DatabaseUnreachable as error:
            self._keep(token, outcome, error)

    def _keep(self, token: Token, outcome: dict[str, Any], error: DatabaseUnreachable) -> None:
        try:
            _spool(self._spooled(token), outcome)
            log.warning("j%s: %s; its outcome is spooled", token[0], error)
        except OSError as full:
            log.warning("j%s: %s, and %s; its outcome is kept in memory", token[0], error, full)
            self._in_memory[token] = outcome

    def _replay_from_memory(self, token: Token, outcome: dict[str, Any]) -> None:
        try:
            self._write(token, outcome)
        except DatabaseUnreachable:
            with suppress(OSError):
                _spool(self._spooled(token), outcome)
                self._in_memory.pop(token, None)
            raise
        except Exception:
            log.exception("the outcome of j%s cannot be recorded", token[0])
        # Two threads of a worker may be at it at once.
        self._in_memory.pop(token, None)

    def _spooled(self, token: Token) -> Path:
        return self._settings.spool / f"{token[0]}-{token[1]}.json"

    def _write(self, token: Token, outcome: dict[str, Any]) -> None:
        with self._database.write() as session:
            if outcome["outcome"] == "handed_back":
                jobs.hand_back(session, [token], alone=outcome["alone"])
                return
            if outcome["outcome"] == "failed":
                jobs.fail(
                    session,
                    token,
                    job_error(outcome["kind"], outcome["message"], outcome.get("needed_bytes")),
                    backoff_s=self._settings.backoff_s,
                    max_failures=self._settings.max_failures,
                    lease_s=self._settings.lease_s,
                )
                return
            checkpoint = outcome["checkpoint"]
            if checkpoint is not None:
                checkpoints.record(session, job_id=token[0], **checkpoint)
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


def _read(path: Path) -> tuple[Token, dict[str, Any]]:
    job_id, _, attempt = path.stem.partition("-")
    return (int(job_id), int(attempt)), json.loads(path.read_text())


def _spool(path: Path, outcome: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w") as file:
            json.dump(outcome, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
