"""The jobs of a report that have no result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qbatch.core.domain import JobState
from qbatch.models_db.job_record import WholeJob
from qbatch.views.report.report_table import RowLabel


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmeasuredJob:
    """``log_command``: what shows the log, if a worker has begun the job."""

    label: RowLabel
    state: str
    has_failed: bool
    error_kind: str
    error_message: str
    attempts: int
    log_command: str | None


def unmeasured_jobs(jobs: Iterable[WholeJob]) -> list[UnmeasuredJob]:
    """The jobs without a result, the failed ones first."""
    found = [_unmeasured(job) for job in jobs if job.row.state != JobState.SUCCEEDED]
    return sorted(found, key=lambda job: not job.has_failed)


def _unmeasured(job: WholeJob) -> UnmeasuredJob:
    row, attempts = job.row, len(job.record.attempts)
    return UnmeasuredJob(
        label=RowLabel.of_job(row),
        state=row.state,
        has_failed=row.state == JobState.FAILED,
        error_kind=row.error_kind or "",
        error_message=row.error_message or "",
        attempts=attempts,
        log_command=f"qbatch logs {row.job_id}" if attempts else None,
    )
