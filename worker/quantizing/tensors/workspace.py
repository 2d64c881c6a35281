"""A thread's own road through the device: buffers that are used again and again, and turns on the GPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

# What is made of so much fits a core's cache.
_CPU_PIECE_BYTES = 2**20
# Large enough that launching kernels costs nothing beside copying, small enough that all lanes' buffers are.
_CUDA_PIECE_BYTES = 2**24
_MOST_CUDA_LANES = 16


class Workspace(Protocol):
    """What a streaming thread needs of a device. A lane belongs to the thread that made it."""

    def input(self, nbytes: int) -> torch.Tensor:
        """uint8 [at least nbytes] on the host, valid until the next call."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Device work is enqueued inside."""

    def to_device(self, host: torch.Tensor) -> torch.Tensor: ...

    def stage(self, part: torch.Tensor) -> torch.Tensor:
        """A flat uint8 view of ``part`` on the host, valid after ``wait``."""

    def wait(self) -> None:
        """Return once everything staged is there."""


class CpuWorkspace:
    """Quantizes on one core. torch's own threads would only wait for each other on pieces this small."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._input = torch.empty(_CPU_PIECE_BYTES, dtype=torch.uint8)

    def input(self, nbytes: int) -> torch.Tensor:
        return self._input if nbytes <= len(self._input) else torch.empty(nbytes, dtype=torch.uint8)

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        return host

    def stage(self, part: torch.Tensor) -> torch.Tensor:
        return as_bytes(part)

    def wait(self) -> None:
        return


class CudaWorkspace:
    """Copies to the GPU and back through pinned memory that torch's allocator keeps and hands out again.

    All lanes work on the default stream, one at a time: bitsandbytes' 4-bit kernel runs there whatever the current
    stream is. A turn only enqueues; reading, writing and hashing go on beside it.
    """

    _turns = threading.Lock()

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        torch.cuda.set_device(self._device)
        self._input = torch.empty(_CUDA_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def input(self, nbytes: int) -> torch.Tensor:
        return self._input if nbytes <= len(self._input) else torch.empty(nbytes, dtype=torch.uint8)

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._turns:
            yield
            self._done.record()

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self._device, non_blocking=True)

    def stage(self, part: torch.Tensor) -> torch.Tensor:
        host = torch.empty(part.nbytes, dtype=torch.uint8, pin_memory=True)
        return host.copy_(as_bytes(part), non_blocking=True)

    def wait(self) -> None:
        self._done.synchronize()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, flat, on its device."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def host_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a flat uint8 tensor on the host, to read into or to write from."""
    array: Any = tensor.numpy()
    return memoryview(array)


def make_workspace(device: str) -> Workspace:
    return CpuWorkspace() if device == "cpu" else CudaWorkspace(device)


def workspace_count(device: str) -> int:
    """How many lanes keep the machine busy: one for each core that torch may use, or enough to hide the I/O."""
    return torch.get_num_threads() if device == "cpu" else min(_MOST_CUDA_LANES, os.cpu_count() or 1)


def piece_bytes(device: str) -> int:
    """How much of the source a lane takes at a time, where a tensor allows it."""
    return _CPU_PIECE_BYTES if device == "cpu" else _CUDA_PIECE_BYTES


def writers_per_file(device: str) -> int:
    """How many lanes may be in the kernel to write to one file. It lets one of them write, while the others spin: the
    one that spins takes over at once, which is worth a core where there are enough."""
    return 1 if device == "cpu" else 2
