"""transformers' initialization after loading: what it overwrites of the source's values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qbatch.core.errors import one_line
from qbatch.worker.quantizing.tensors.trace import traced_tensors


def why_overwritten(model: Any, info: Any) -> str | None:
    """Initialize a traced ``model`` that is not tied yet, as ``from_pretrained`` does, and say what of the source's
    values that changes; None where it changes nothing.

    It is meant for what the source lacks. But it tells loaded tensors by an attribute, which a slice of one has not,
    so some models set the padding row of a loaded embedding to zero.
    """
    model.mark_tied_weights_as_initialized(info)
    writes = _Writes({_storage(tensor): name for name, tensor in traced_tensors(model)})
    try:
        # Without data nothing is drawn for parameters; a few models draw what they copy into them.
        with torch.random.fork_rng(devices=[]), writes:
            model.initialize_weights()
    except Exception as error:
        return f"whether transformers overwrites what it loaded cannot be seen without data: {one_line(error)}"
    return f"transformers overwrites values of {writes.hit[0]} after loading" if writes.hit else None


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which of the ``watched`` tensors (names by storage) are written to, in whatever way, slices included."""

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
            values = {one.name: value for one, value in zip(arguments, args, strict=False)} | kwargs
            self._note([values.get(one.name) for one in arguments if one.is_write])
        return func(*args, **kwargs)

    def _note(self, written: list[Any]) -> None:
        for tensor in written:
            if isinstance(tensor, torch.Tensor) and (name := self._watched.get(_storage(tensor))):
                self.hit.append(name)


def _storage(tensor: torch.Tensor) -> int:
    storage: int = tensor.untyped_storage()._cdata
    return storage
