"""VRAM classes: which GPUs count as of one size."""

from __future__ import annotations

from qbatch.core.byte_units import GIB
from qbatch.core.domain import DeviceKind
from qbatch.models_db.tables import Worker

VRAM_CLASSES = (4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288)
"""In GiB, as cards are sold."""

# Error correction and the driver keep some of it back: cards sold with 24 GB show 22.5 to 24 GiB.
_SHOWN_TENTHS = 9


def vram_class(memory_bytes: int) -> int:
    """The class of a GPU that shows ``memory_bytes``: the largest of which it has nine tenths, else the smallest."""
    return max(size for size in VRAM_CLASSES if floor_bytes(size) <= memory_bytes)


def floor_bytes(size: int) -> int:
    """What every GPU of the class has at least. The smallest class promises nothing."""
    return 0 if size == VRAM_CLASSES[0] else size * GIB * _SHOWN_TENTHS // 10


ANY_CLASS_BYTES = floor_bytes(VRAM_CLASSES[1])
"""A job that is predicted to need less than this may go to any GPU."""


def usable_bytes(worker: Worker) -> int:
    """The bytes that a worker counts for: its class's, so that cards sold as one size are as good as each other.

    Nothing for a CPU: what ran out of a GPU's memory waits for a GPU.
    """
    return floor_bytes(vram_class(worker.memory_bytes)) if worker.device_kind == DeviceKind.CUDA else 0


def show_need(above_bytes: int) -> str:
    """``needs a GPU of more than 24 GiB``, for one whose 22.5 GiB were too few."""
    return f"needs a GPU of more than {max(vram_class(above_bytes), round(above_bytes / GIB))} GiB"


def no_larger(above_bytes: int) -> str:
    """``show_need`` where nobody has such a GPU."""
    return f"{show_need(above_bytes)}, and no live worker has one"
