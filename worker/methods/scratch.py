"""Buffers that a thread reuses. Newly allocated memory of a piece's size causes page faults, which cost more than the
arithmetic on the piece."""

from __future__ import annotations

import threading

import torch

# Enough for a piece of the source in float32. Larger tensors are rare, and get no buffer that is kept.
_MAX_VALUES = 2**20


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[str, torch.Tensor] = {}


_buffers = _Buffers()


def as_floats(values: torch.Tensor, use: str) -> torch.Tensor:
    """``values`` in float32. On a CPU, the result is valid until this thread's next call with the same ``use``."""
    if values.device.type != "cpu" or values.numel() > _MAX_VALUES or values.dtype is torch.float32:
        return values.float()
    buffer = _buffers.by_use.get(use)
    if buffer is None or len(buffer) < values.numel():
        buffer = _buffers.by_use[use] = torch.empty(values.numel(), dtype=torch.float32)
    return buffer[: values.numel()].view(values.shape).copy_(values)
