"""One short forward pass, watched: which linear layers read the same input, and in which order the blocks run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from qbatch.worker.measuring.quality.probes import Probe

_TOKENS = 8


@dataclass(slots=True, kw_only=True)
class InputTrace:
    """``readers``: sets of linear layers with one parent that were called with the same tensor. ``calls`` counts the
    calls of each block. ``ended_before``: how many blocks had ended when a linear layer or a block was first called;
    those that were never called are absent. ``ended`` names the blocks in the order in which they ended."""

    readers: list[Set[str]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    ended_before: dict[str, int] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)


class _Watch:
    """The hooks, and what they note. Inputs are kept, so that no two have one address."""

    def __init__(self) -> None:
        self.trace = InputTrace()
        self._inputs: list[torch.Tensor] = []
        self._readers: dict[tuple[Any, ...], set[str]] = defaultdict(set)

    def linear(self, name: str, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.trace.ended_before.setdefault(name, len(self.trace.ended))
        value = args[0] if args else next(iter(kwargs.values()))
        self._inputs.append(value)
        place = (value.data_ptr(), tuple(value.shape), value.stride())
        self._readers[name.rpartition(".")[0], place].add(name)

    def begin(self, name: str, _module: Any, _args: Any) -> None:
        self.trace.ended_before.setdefault(name, len(self.trace.ended))
        self.trace.calls[name] += 1

    def end(self, name: str, _module: Any, _args: Any, _output: Any) -> None:
        self.trace.ended.append(name)

    def finished(self) -> InputTrace:
        return replace(self.trace, readers=list(self._readers.values()))


@torch.inference_mode()
def trace_inputs(
    model: Any, linears: Mapping[str, Any], blocks: Mapping[str, Any], probe: Probe, device: str
) -> InputTrace:
    """Run ``model`` on the first tokens of ``probe``, and watch its ``linears`` and ``blocks`` (modules by name)."""
    watch = _Watch()
    hooks = [
        module.register_forward_pre_hook(partial(watch.linear, name), with_kwargs=True)
        for name, module in linears.items()
    ]
    for name, module in blocks.items():
        hooks += [
            module.register_forward_pre_hook(partial(watch.begin, name)),
            module.register_forward_hook(partial(watch.end, name)),
        ]
    try:
        model(**shortened(probe, _TOKENS).inputs(model, device))
    finally:
        for hook in hooks:
            hook.remove()
    return watch.finished()


def shortened(probe: Probe, tokens: int) -> Probe:
    """The first ``tokens`` of a probe, without what it compares."""
    return Probe(ids=probe.ids[:tokens], labels=probe.labels[:tokens])
