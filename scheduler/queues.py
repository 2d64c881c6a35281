"""The Redis queues: one for CPUs, and one for each VRAM class of GPUs (see ``core/vram_classes.py``)."""

from __future__ import annotations

from qbatch.core.domain import DeviceKind
from qbatch.core.vram_classes import VRAM_CLASSES, vram_class

RUN_BUNDLE = "qbatch.run_bundle"
"""The name of the Celery task: all that the scheduler knows about the worker's code."""

PRIORITY_STEPS = list(range(10))
_MIDDLE = 5


def queue_of(kind: DeviceKind, size: int | None = None) -> str:
    """The queue of bundles for a kind of device. ``size`` is the VRAM class, required for GPUs."""
    return f"qbatch.{kind.value}" if size is None else f"qbatch.{kind.value}.{size}"


def all_queues() -> list[str]:
    """Every queue that there may be: that of the CPUs, then those of GPUs, the smallest first."""
    return [queue_of(DeviceKind.CPU), *(queue_of(DeviceKind.CUDA, size) for size in VRAM_CLASSES)]


def queues_of(kind: DeviceKind, memory_bytes: int) -> list[str]:
    """The queues that a worker with this device reads, that of its own class first.

    Among equally urgent bundles it prefers those that need its memory. Otherwise it takes those of smaller classes, so
    that it is never idle while smaller workers have a backlog.
    """
    if kind is not DeviceKind.CUDA:
        return [queue_of(kind)]
    own = vram_class(memory_bytes)
    return [queue_of(kind, size) for size in reversed(VRAM_CLASSES) if size <= own]


def redis_priority(priority: int) -> int:
    """Convert a batch's priority to that of a message, where 0 comes first.

    Priorities beyond the range become equal in Redis; the database still sends the higher one first.
    """
    return min(max(_MIDDLE - priority, PRIORITY_STEPS[0]), PRIORITY_STEPS[-1])
