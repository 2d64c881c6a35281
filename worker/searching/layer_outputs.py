"""What the blocks of a model answered, so that a pass that changes only later ones need not run the earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from qbatch.worker.machine.device_faults import device_fault
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.quality.replay import logits_of
from qbatch.worker.searching.input_trace import shortened

_TOKENS = 16

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


def is_replayable(model: Any, blocks: Sequence[str], counts: Iterable[int], probe: Probe, device: str) -> bool:
    """Whether passes that skip the first of ``blocks``, as many as each of ``counts`` says, give the same to the bit.

    They do not if a block hands on more than its output: the last layers of Gemma 3n attend to keys of earlier ones.
    """
    short = shortened(probe, _TOKENS)
    with recorded(model, blocks) as outputs:
        whole = logits_of(model, short, device)
    # Now what a block may have left in the model is of another text.
    logits_of(model, Probe(ids=short.ids[::-1], labels=short.labels[::-1]), device)
    return all(_gives(whole, model, outputs, blocks[:count], short, device) for count in sorted({*counts}) if count)


def _gives(
    expected: torch.Tensor, model: Any, outputs: WindowOutputs, skipped: Sequence[str], probe: Probe, device: str
) -> bool:
    try:
        with replayed(model, outputs, skipped):
            return torch.equal(logits_of(model, probe, device), expected)
    except Exception as error:
        # A model's code may raise anything where it lacks what an earlier block would have left.
        if device_fault(error) is not None:
            raise
        return False


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
