"""What the blocks of a model answered, so that a pass that changes only later ones need not run the earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

WindowOutputs = Mapping[str, Any]
"""The output of each block on one window, by the block's name."""


@contextmanager
def recorded(model: Any, blocks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Within the context, the outputs of ``blocks`` are copied into the mapping that it gives."""
    outputs: dict[str, Any] = {}
    hooks = [model.get_submodule(name).register_forward_hook(partial(_record, outputs, name)) for name in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replayed(model: Any, outputs: WindowOutputs, blocks: Sequence[str]) -> Iterator[None]:
    """Within the context, ``blocks`` do not run, and answer what ``outputs`` has of them."""
    modules = [(model.get_submodule(name), outputs[name]) for name in blocks]
    for module, output in modules:
        module.forward = partial(_answer, output)
    try:
        yield
    finally:
        for module, _ in modules:
            del module.forward


def nbytes(value: Any) -> int:
    """The bytes of all tensors in a block's output."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(nbytes, value)) if isinstance(value, tuple | list) else 0


def _record(outputs: dict[str, Any], name: str, _module: Any, _args: Any, output: Any) -> None:
    outputs[name] = _copied(output)


def _answer(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    return _copied(output)


def _copied(value: Any) -> Any:
    """A copy: what follows may add to a tensor in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value
