"""The Redis queues: one for each kind of device."""

from __future__ import annotations

from models_db.domain import DeviceKind

RUN_BUNDLE = "qbatch.run_bundle"
"""The task's name: all that the scheduler knows of the worker."""

PRIORITY_STEPS = list(range(10))
_MIDDLE = 5


def queue_of(kind: DeviceKind) -> str:
    return f"qbatch.{kind.value}"


def redis_priority(priority: int) -> int:
    """A batch's priority as Redis counts it, where 0 is served first. Beyond the steps the database orders alone."""
    return min(max(_MIDDLE - priority, PRIORITY_STEPS[0]), PRIORITY_STEPS[-1])
