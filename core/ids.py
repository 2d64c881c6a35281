"""How people write the ids of batches and jobs: ``b12``, ``j345``, ``latest``."""

from __future__ import annotations

import re


def format_batch_id(number: int) -> str:
    return f"b{number}"


def format_job_id(number: int) -> str:
    return f"j{number}"


_TYPED_ID = re.compile(r"([bj])([1-9][0-9]{0,9})")
LARGEST_ID = 2**31 - 1
"""The largest id that a database column holds."""


LATEST = "latest"
"""What people call the batch that was submitted last."""


def find_id(text: str) -> tuple[str, int] | None:
    """``b12`` → ("b", 12), ``j345`` → ("j", 345); None for anything else."""
    match = _TYPED_ID.fullmatch(text)
    if match is None or int(match[2]) > LARGEST_ID:
        return None
    return match[1], int(match[2])


def job_number(job_id: str) -> int:
    """``j345`` → 345: what ``format_job_id`` was given."""
    return int(job_id.removeprefix("j"))


def batch_number(batch_id: str) -> int:
    """``b12`` → 12: what ``format_batch_id`` was given."""
    return int(batch_id.removeprefix("b"))
