"""Detects loaded values that transformers' initialization after loading overwrites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qbatch.core.errors import one_line
from qbatch.worker.quantizing.tensors.trace import traced_tensors


def why_overwritten(model: Any, info: Any) -> str | None:
    """Initialize a traced ``model`` whose weights are not tied yet, as ``from_pretrained`` does. Return a message that
    names a loaded tensor which this overwrites, or None.

    The initialization is meant for tensors that the source lacks. It recognizes loaded tensors by an attribute, which
    a slice of a tensor does not have, so some models set the padding row of a loaded embedding to zero.
    """
    model.mark_tied_weights_as_initialized(info)
    writes = _Writes({_storage(tensor): name for name, tensor in traced_tensors(model)})
    try:
        # Meta tensors draw no random numbers, but a few models draw real values and copy them into parameters.
        with torch.random.fork_rng(devices=[]), writes:
            model.initialize_weights()
    except Exception as error:
        return f"whether transformers overwrites what it loaded cannot be seen without data: {one_line(error)}"
    return f"transformers overwrites values of {writes.hit[0]} after loading" if writes.hit else None


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which ``watched`` tensors (names by storage) are written to by any operation, also through slices."""

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched = watched
        self.hit: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            arguments = func._schema.arguments
            values = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
            self._record([values.get(argument.name) for argument in arguments if argument.is_write])
        return func(*args, **kwargs)

    def _record(self, written: list[Any]) -> None:
        for tensor in written:
            if isinstance(tensor, torch.Tensor) and (name := self._watched.get(_storage(tensor))):
                self.hit.append(name)


def _storage(tensor: torch.Tensor) -> int:
    storage: int = tensor.untyped_storage()._cdata
    return storage
