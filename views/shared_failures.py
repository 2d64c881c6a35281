"""Failures that several jobs share, so that each is said once with the jobs that it is of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from qbatch.views.formats import printable

_JOBS_NAMED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFailure:
    """What went wrong, and the jobs that it ended, in the order given. ``log_of``: the first of them that has a log."""

    job_ids: Sequence[str]
    text: str
    log_of: str | None

    def __str__(self) -> str:
        return f"{name_jobs(self.job_ids)}: {printable(self.text)}" + (
            "" if self.log_of is None else hint_at_log(self.log_of)
        )


def hint_at_log(job_id: str) -> str:
    return f" (see `qbatch logs {job_id}`)"


def shared_failures(failures: Iterable[tuple[str, str]], logged: Collection[str] = ()) -> list[SharedFailure]:
    """``failures``: a job's id and what ended it. Failures with the same text are one. ``logged``: the jobs that a
    worker has begun, so that they have a log."""
    jobs: dict[str, list[str]] = {}
    for job_id, text in failures:
        jobs.setdefault(text, []).append(job_id)
    return [
        SharedFailure(job_ids=ids, text=text, log_of=next((one for one in ids if one in logged), None))
        for text, ids in jobs.items()
    ]


def name_jobs(job_ids: Sequence[str], most: int = _JOBS_NAMED) -> str:
    """``j1, j2, j3 and 97 more``"""
    # One more id is not longer than the words for it.
    shown = job_ids if len(job_ids) <= most + 1 else job_ids[:most]
    more = len(job_ids) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
