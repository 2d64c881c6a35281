"""Where the logs of jobs are, and what their files are called."""

from __future__ import annotations

import re
from pathlib import Path

_RUNNER = ".runner.log"
_NAME = re.compile(r"j([0-9]+)-[0-9]+(?:\.runner)?\.log")


def job_log(folder: Path, job_id: int, attempt: int) -> Path:
    """The log of one attempt of a job: what qbatch itself says about it. ``folder`` is that of the database."""
    return folder / f"j{job_id}-{attempt}.log"


def runner_log(folder: Path, job_id: int, attempt: int) -> Path:
    """All that a runner and its libraries print. It is named after the first job of the runner's bundle."""
    return folder / f"j{job_id}-{attempt}{_RUNNER}"


def is_of_runner(name: str) -> bool:
    """Whether a log is that of a runner."""
    return name.endswith(_RUNNER)


def job_of_log(name: str) -> int | None:
    """The id of the job after which a log is named; None for other files."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])
