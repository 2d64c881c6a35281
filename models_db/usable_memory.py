"""How much of a worker's memory counts."""

from __future__ import annotations

from qbatch.core.domain import DeviceKind
from qbatch.core.vram_classes import floor_bytes, vram_class
from qbatch.models_db.tables import Worker


def usable_bytes(worker: Worker) -> int:
    """The least memory of the worker's class in bytes, so that all GPUs of one class are equal.

    0 for a CPU, because a job that ran out of GPU memory needs a larger GPU.
    """
    return floor_bytes(vram_class(worker.memory_bytes)) if worker.device_kind == DeviceKind.CUDA else 0
