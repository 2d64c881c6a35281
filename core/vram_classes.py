"""VRAM classes: which GPUs count as of one size."""

from __future__ import annotations

from qbatch.core.byte_units import GIB

VRAM_CLASSES = (4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288)
"""In GiB, as GPUs are sold."""

# Error correction and the driver use some of the memory: GPUs sold with 24 GB show 22.5 to 24 GiB.
_SHOWN_TENTHS = 9


def vram_class(memory_bytes: int) -> int:
    """The class of a GPU with ``memory_bytes``: the largest of which it has nine tenths, else the smallest class."""
    return max(size for size in VRAM_CLASSES if floor_bytes(size) <= memory_bytes)


def floor_bytes(size: int) -> int:
    """The least memory of a GPU of this class in bytes; 0 for the smallest class."""
    return 0 if size == VRAM_CLASSES[0] else size * GIB * _SHOWN_TENTHS // 10


ANY_CLASS_BYTES = floor_bytes(VRAM_CLASSES[1])
"""A job that is predicted to need less than this may run on any GPU."""


def show_need(above_bytes: int) -> str:
    """``needs a GPU of more than 24 GiB``, even if it ran out of the 22.5 GiB that such a GPU shows."""
    return f"needs a GPU of more than {max(vram_class(above_bytes), round(above_bytes / GIB))} GiB"


def no_larger(above_bytes: int) -> str:
    """A message that a job needs such a GPU, and that no live worker has one."""
    return f"{show_need(above_bytes)}, and no live worker has one"
