"""The GPU memory that a job needs more of: predicted before it ran, or seen on a GPU that was too small.

Both stand in the column ``above_memory_bytes``, the newest word on it. Which of the two it is, the job's attempts say:
one that ran out of memory is on record in the transaction that wrote what was seen. A column of its own would be a
second truth, and workers of an older version would not write it during a rolling upgrade.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, and_, case, func, or_, select

from qbatch.core.errors import CudaOom
from qbatch.models_db.tables import Attempt, Job, Worker


class NeedIs(StrEnum):
    """PREDICTED chooses the queue and forbids nothing. SEEN forbids every GPU that has no more, for good."""

    PREDICTED = "predicted"
    SEEN = "seen"


# Less than the smallest class holds, which is nothing for certain, where nothing is known.
NEED_BYTES: ColumnElement[int] = func.coalesce(Job.above_memory_bytes, -1)


def need_is() -> ColumnElement[Any]:
    """Which of the two a job's need is; null where nothing is known of it."""
    return case(
        (Job.above_memory_bytes.is_(None), None),
        (_ran_out(), NeedIs.SEEN.value),
        else_=NeedIs.PREDICTED.value,
    )


def may_run_in(room_bytes: int) -> ColumnElement[bool]:
    """A job that was not seen to need more than ``room_bytes``."""
    return or_(Job.above_memory_bytes.is_(None), Job.above_memory_bytes < room_bytes, ~_ran_out())


def seen_too_large_for(room_bytes: int) -> ColumnElement[bool]:
    """A job that was seen to need more than ``room_bytes``: the opposite of ``may_run_in``."""
    return and_(Job.above_memory_bytes >= room_bytes, _ran_out())


def remember_too_small(job: Job, worker: Worker) -> None:
    """Note what was seen: this worker's GPU is too small. A prediction gives way to it.

    The claim saw to it that this is more than what was seen before. The attempt must end as ``cuda_oom`` in the same
    transaction.
    """
    job.above_memory_bytes = worker.memory_bytes


def _ran_out() -> ColumnElement[bool]:
    """A job that did not fit into some GPU's memory."""
    return select(Attempt.id).where(Attempt.job_id == Job.id, Attempt.outcome == CudaOom.kind).correlate(Job).exists()
