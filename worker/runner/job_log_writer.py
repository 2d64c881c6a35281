"""Writes what a runner says about a job into that job's own log."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from qbatch.core.control_characters import escape_controls
from qbatch.core.domain import Claim, job_number
from qbatch.core.job_log import job_log

# A line that is about certain jobs begins with their ids, as "j7, j8: quantizing" does.
_NAMED = re.compile(r"(j[0-9]+(?:, j[0-9]+)*): ")


class JobLogWriter(logging.Handler):
    """Writes each line into the logs of the jobs that it names, or, if it names none, of all that have not ended.

    Meant for the logger ``qbatch`` alone: what other libraries say stays in the runner's log. A log that cannot be
    written is mentioned there once, and does not disturb the work.
    """

    def __init__(self, folder: Path, claims: Iterable[Claim]) -> None:
        super().__init__(logging.INFO)
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)
        self._paths = {claim.job_id: job_log(folder, claim.job_id, claim.attempt) for claim in claims}
        self._descriptors: dict[int, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        line = escape_controls(self.format(record), in_lines=True) + "\n"
        for job_id in self._concerned(record.getMessage()):
            self._append(job_id, line.encode())

    def end(self, job_ids: Iterable[int]) -> None:
        """These jobs have ended here: nothing more is written into their logs."""
        self.acquire()
        try:
            for job_id in job_ids:
                self._drop(job_id)
        finally:
            self.release()

    def close(self) -> None:
        self.end(list(self._paths))
        super().close()

    def _concerned(self, message: str) -> list[int]:
        named = _NAMED.match(message)
        if named is None:
            return list(self._paths)
        ids = map(job_number, named[1].split(", "))
        return [job_id for job_id in ids if job_id in self._paths]

    def _append(self, job_id: int, line: bytes) -> None:
        try:
            if job_id not in self._descriptors:
                self._descriptors[job_id] = os.open(self._paths[job_id], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.write(self._descriptors[job_id], line)
        except OSError as error:
            path = self._paths[job_id]
            self._drop(job_id)
            print(f"runner: cannot write the log {path}: {error.strerror}", file=sys.stderr, flush=True)  # noqa: T201

    def _drop(self, job_id: int) -> None:
        self._paths.pop(job_id, None)
        descriptor = self._descriptors.pop(job_id, None)
        if descriptor is not None:
            os.close(descriptor)
