"""The Redis queues: one for CPUs, and one for each VRAM class of GPUs."""

from __future__ import annotations

from qbatch.core.domain import DeviceKind
from qbatch.models_db.vram import VRAM_CLASSES, vram_class

RUN_BUNDLE = "qbatch.run_bundle"
"""The task's name: all that the scheduler knows of the worker."""

PRIORITY_STEPS = list(range(10))
_MIDDLE = 5


def queue_of(kind: DeviceKind, size: int | None = None) -> str:
    """Where bundles wait for a device of that kind; ``size`` is a VRAM class, which every queue of GPUs has."""
    return f"qbatch.{kind.value}" if size is None else f"qbatch.{kind.value}.{size}"


def queues_of(kind: DeviceKind, memory_bytes: int) -> list[str]:
    """The queues that such a worker reads, that of its own class first.

    Of equally urgent bundles it takes those that need its memory; with none it takes smaller ones, and is never idle
    beside a smaller worker's backlog.
    """
    if kind is not DeviceKind.CUDA:
        return [queue_of(kind)]
    own = vram_class(memory_bytes)
    return [queue_of(kind, size) for size in reversed(VRAM_CLASSES) if size <= own]


def redis_priority(priority: int) -> int:
    """A batch's priority as Redis counts it, where 0 is served first. Beyond the steps the database orders alone."""
    return min(max(_MIDDLE - priority, PRIORITY_STEPS[0]), PRIORITY_STEPS[-1])
