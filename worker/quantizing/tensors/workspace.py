"""A thread's buffers for moving pieces of tensors to the device and back, and its exclusive access to the GPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

# The results of quantizing a piece of this size fit into a core's cache.
_CPU_PIECE_BYTES = 2**20
# Large enough that launching kernels is negligible compared with copying, small enough that all buffers together are
# small.
_CUDA_PIECE_BYTES = 2**24
_MAX_CUDA_WORKSPACES = 16


class Workspace(Protocol):
    """What a streaming thread needs to use a device. A workspace belongs to the thread that created it."""

    def input(self, nbytes: int) -> torch.Tensor:
        """A uint8 buffer [at least nbytes] on the host, reused by the next call."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A context with exclusive use of the device; enqueue all device work inside it."""

    def to_device(self, host: torch.Tensor) -> torch.Tensor: ...

    def stage(self, part: torch.Tensor) -> torch.Tensor:
        """The bytes of ``part`` on the host, flat uint8, valid after ``wait``."""

    def wait(self) -> None:
        """Block until everything staged has arrived on the host."""


class CpuWorkspace:
    """Quantizes on one core. On pieces this small, torch's own threads would only wait for each other."""

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
    """Copies to the GPU and back through pinned memory, which torch's allocator caches and reuses.

    All workspaces use the default stream, one at a time, because bitsandbytes' 4-bit kernel always runs there, whatever
    the current stream is. A turn only enqueues work; reading, writing and hashing continue in parallel.
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
    """How many workspaces keep the machine busy: on a CPU one per core that torch may use, on a GPU enough to hide the
    time of reading and writing."""
    return torch.get_num_threads() if device == "cpu" else min(_MAX_CUDA_WORKSPACES, os.cpu_count() or 1)


def piece_bytes(device: str) -> int:
    """How many bytes of the source to process at a time, where a tensor can be divided that finely."""
    return _CPU_PIECE_BYTES if device == "cpu" else _CUDA_PIECE_BYTES


def writers_per_file(device: str) -> int:
    """How many threads may call the kernel to write to one file. The kernel lets one write while the others spin. A
    spinning thread takes over immediately, which is worth a core if there are enough of them."""
    return 1 if device == "cpu" else 2
