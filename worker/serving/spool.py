"""Outcomes on this machine's disk until the database takes them: one file a job's attempt, ``<job>-<attempt>.json``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbatch.models_db.jobs import Token

log = logging.getLogger("qbatch.worker")

SPOOL_VERSION = 1
"""Rises when an older version could misread what is spooled. Every version reads all that came before; the first had no
number, nor the database's identity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """What became of an attempt. ``database``: the identity of the one that holds the job, where it is known.

    ``outcome`` is of plain JSON values: ``{"outcome": "succeeded" | "failed" | "handed_back", …}``.
    """

    token: Token
    database: str | None
    outcome: dict[str, Any]


class Spool:
    """A folder. The workers of a machine share it: what one reads another may have taken away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._newer: set[Path] = set()

    def waiting(self) -> Sequence[Path]:
        return sorted(self._folder.glob("*.json"))

    def put(self, spooled: Spooled) -> Path:
        """Write it, whole or not at all. Raises OSError where the disk does not take it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "{}-{}.json".format(*spooled.token)
        partial = path.with_suffix(".partial")
        try:
            with partial.open("w") as file:
                json.dump({"version": SPOOL_VERSION, "database": spooled.database} | spooled.outcome, file)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        return path

    def read(self, path: Path) -> Spooled | None:
        """None for one that a newer version wrote: it is left to that version.

        Raises FileNotFoundError where it is no longer there, and ValueError for what is no spooled outcome.
        """
        job_id, _, attempt = path.stem.partition("-")
        token = int(job_id), int(attempt)
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not isinstance(version := found.pop("version", 0), int):
            raise ValueError("it is no spooled outcome")
        if version > SPOOL_VERSION:
            if path not in self._newer:
                log.warning("%s was spooled by a newer qbatch (version %s of the spool); left to it", path, version)
                self._newer.add(path)
            return None
        database = found.pop("database", None)
        if "outcome" not in found:
            raise ValueError("it names no outcome")
        return Spooled(token=token, database=database, outcome=found)

    def set_aside(self, path: Path) -> Path:
        """Rename it, so that nobody tries it again; its new name. Raises FileNotFoundError where another was first."""
        aside = path.with_suffix(".rejected")
        path.replace(aside)
        return aside
