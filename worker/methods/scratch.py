"""Memory that a thread uses again and again. Fresh memory of a piece's size comes page by page from the system, and the
page faults cost more than the arithmetic done in it."""

from __future__ import annotations

import threading

import torch

# A piece of the source takes twice or four times its size as float32. What is larger is rare, and not kept.
_MOST_VALUES = 2**20


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[str, torch.Tensor] = {}


_buffers = _Buffers()


def as_floats(values: torch.Tensor, use: str) -> torch.Tensor:
    """16-bit ``values`` in float32. On a CPU they are valid until this thread's next call for the same ``use``."""
    if values.device.type != "cpu" or values.numel() > _MOST_VALUES or values.dtype is torch.float32:
        return values.float()
    buffer = _buffers.by_use.get(use)
    if buffer is None or len(buffer) < values.numel():
        buffer = _buffers.by_use[use] = torch.empty(values.numel(), dtype=torch.float32)
    return buffer[: values.numel()].view(values.shape).copy_(values)
