"""A lower bound of the GPU memory that a job needs: predicted before it ran, or observed on a GPU that was too small.

Both are stored in the column ``above_memory_bytes``, which holds the newest value. The job's attempts show which of the
two it is: the transaction that stores an observed value also records the attempt that ran out of memory. A separate
column could contradict the attempts, and workers of an older version would not write it during a rolling upgrade.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, and_, case, func, or_, select

from qbatch.core.errors import CudaOom
from qbatch.models_db.tables import Attempt, Job, Worker


class NeedSource(StrEnum):
    """Where the bound comes from.

    PREDICTED only chooses the queue. SEEN permanently excludes every GPU that does not have more memory.
    """

    PREDICTED = "predicted"
    SEEN = "seen"


# The bound; -1 if nothing is known, which is less than the memory of any worker, CPU workers included.
NEED_BYTES: ColumnElement[int] = func.coalesce(Job.above_memory_bytes, -1)


def need_source() -> ColumnElement[Any]:
    """The ``NeedSource`` of a job's need; null if nothing is known."""
    return case(
        (Job.above_memory_bytes.is_(None), None),
        (ran_out(), NeedSource.SEEN.value),
        else_=NeedSource.PREDICTED.value,
    )


def may_run_in(memory_bytes: int) -> ColumnElement[bool]:
    """Jobs that may run with that much GPU memory: no attempt has shown that they need more."""
    has_not_run = Job.attempt == 0
    return or_(Job.above_memory_bytes.is_(None), Job.above_memory_bytes < memory_bytes, has_not_run, ~ran_out())


def seen_too_large_for(memory_bytes: int) -> ColumnElement[bool]:
    """Jobs that were observed to need more than ``memory_bytes``; the opposite of ``may_run_in``."""
    return and_(Job.above_memory_bytes >= memory_bytes, Job.attempt > 0, ran_out())


def remember_too_small(job: Job, worker: Worker) -> None:
    """Record that the memory of this worker's GPU was too small for the job. This replaces a prediction.

    The value is larger than any observed before, because the job was claimed only by workers with more memory. The
    caller must end the attempt with ``cuda_oom`` in the same transaction.
    """
    job.above_memory_bytes = worker.memory_bytes


def ran_out() -> ColumnElement[bool]:
    """Jobs that have run out of memory on some GPU."""
    # No EXISTS: for that, PostgreSQL may read all attempts beforehand.
    one = select(func.min(Attempt.id)).where(Attempt.job_id == Job.id, Attempt.outcome == CudaOom.kind)
    return one.correlate(Job).scalar_subquery().is_not(None)
