"""Outcomes kept on disk until the database accepts them, one file per attempt: ``<job>-<attempt>.json``."""

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

SPOOL_VERSION = 2
"""Increased when an older qbatch could misread the files. Every version reads all earlier formats; the first had
neither a version number nor the identity of the database, and version 1 no searches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """The outcome of an attempt. ``database`` is the identity of the job's database, or None if it is unknown.

    ``outcome`` consists of plain JSON values: ``{"outcome": "succeeded" | "searched" | "failed" | "handed_back", …}``.
    """

    token: Token
    database: str | None
    outcome: dict[str, Any]


class Spool:
    """The spool folder. All workers of a machine share it, so a file may disappear while one of them reads it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._newer: set[Path] = set()

    def waiting(self) -> Sequence[Path]:
        return sorted(self._folder.glob("*.json"))

    def put(self, spooled: Spooled) -> Path:
        """Write a file, completely or not at all. Raises OSError."""
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
        """Read a file. Returns None if a newer version wrote it, which must then record it.

        Raises FileNotFoundError if it no longer exists, ValueError if it is not a spooled outcome, or OSError.
        """
        job_id, _, attempt = path.stem.partition("-")
        token = int(job_id), int(attempt)
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not isinstance(version := content.pop("version", 0), int):
            raise ValueError("the file is not a spooled outcome")
        if version > SPOOL_VERSION:
            if path not in self._newer:
                log.warning("%s was written by a newer qbatch (spool version %s), which must record it", path, version)
                self._newer.add(path)
            return None
        database = content.pop("database", None)
        if "outcome" not in content:
            raise ValueError("the file contains no outcome")
        return Spooled(token=token, database=database, outcome=content)

    def set_aside(self, path: Path) -> Path:
        """Rename a file, so that it is not tried again, and return its new path.

        Raises FileNotFoundError if another worker has taken it, or OSError.
        """
        aside = path.with_suffix(".rejected")
        path.replace(aside)
        return aside
