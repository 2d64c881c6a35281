"""Reads a source's tensors, whole or in part."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

from qbatch.core.errors import SourceCorrupt
from qbatch.core.sources import Header, TensorInfo
from qbatch.worker.quantizing.tensors.trace import Origin, Steps, elementwise_steps, replay, sources_of
from qbatch.worker.quantizing.tensors.workspace import host_view

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_VALUES_PER_COMPARISON = 2**19


class SourceReader:
    """The open files of a source. Any thread may read; ``on_read`` is called with the number of bytes of each read."""

    def __init__(self, headers: Iterable[Header], on_read: Callable[[int], None]) -> None:
        self._on_read = on_read
        self._files = ExitStack()
        self._same: dict[tuple[Steps, Steps], bool] = {}
        self._tensors: dict[str, tuple[int, TensorInfo]] = {}
        for header in headers:
            descriptor = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)
            self._files.callback(os.close, descriptor)
            self._tensors |= {tensor.name: (descriptor, tensor) for tensor in header.tensors}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def tensors(self) -> list[TensorInfo]:
        return [tensor for _, tensor in self._tensors.values()]

    def info(self, name: str) -> TensorInfo:
        return self._tensors[name][1]

    def position(self, name: str) -> tuple[int, int]:
        """A sort key: tensors in the order of their position on disk."""
        descriptor, tensor = self._tensors[name]
        return descriptor, tensor.start

    def itemsize(self, name: str) -> int:
        return TORCH_DTYPES[self.info(name).dtype].itemsize

    def read_into(self, buffer_of: Callable[[int], torch.Tensor], name: str, start: int, count: int) -> torch.Tensor:
        """Read values [start, start + count) of a tensor, flat, into a uint8 buffer. ``buffer_of(nbytes)`` must return
        a host buffer of at least ``nbytes`` bytes; the result is a view of its front.

        Raises SourceCorrupt if the file is shorter than its header says, or OSError.
        """
        descriptor, tensor = self._tensors[name]
        dtype = TORCH_DTYPES[tensor.dtype]
        nbytes = count * dtype.itemsize
        raw = buffer_of(nbytes)[:nbytes]
        left, position = host_view(raw), tensor.start + start * dtype.itemsize
        while left:
            size = os.preadv(descriptor, [left], position)
            if not size:
                raise SourceCorrupt(f"{name}: the file ends too early, at byte {position}")
            left, position = left[size:], position + size
        self._on_read(len(raw))
        return raw.view(dtype)

    def whole(self, name: str) -> torch.Tensor:
        """The whole tensor, in newly allocated memory."""
        tensor = self.info(name)
        return self.read_into(_new_buffer, name, 0, tensor.numel).view(tensor.shape)

    def same_values(self, one: Origin, other: Origin) -> bool:
        """Whether two tensors are equal, as ``torch.equal`` defines it."""
        one_steps, other_steps = elementwise_steps(one), elementwise_steps(other)
        if one_steps is None or other_steps is None:
            return torch.equal(replay(one, self.whole), replay(other, self.whole))
        # Cached, because the same comparison is made for every target.
        if (one_steps, other_steps) not in self._same:
            self._same[one_steps, other_steps] = self._equal_in_pieces(one, other)
        return self._same[one_steps, other_steps]

    def _equal_in_pieces(self, one: Origin, other: Origin) -> bool:
        (one_name,), (other_name,) = sources_of(one), sources_of(other)
        if self.info(one_name).shape != self.info(other_name).shape:
            return False
        return all(
            torch.equal(self._piece(one, start), self._piece(other, start))
            for start in range(0, self.info(one_name).numel, _VALUES_PER_COMPARISON)
        )

    def _piece(self, origin: Origin, start: int) -> torch.Tensor:
        def read(name: str) -> torch.Tensor:
            return self.read_into(_new_buffer, name, start, min(_VALUES_PER_COMPARISON, self.info(name).numel - start))

        return replay(origin, read)


def _new_buffer(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)
