"""Where a forward pass of a quantized model fails, and which layers have to stay unquantized for it to run."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qbatch.core.domain import Scheme
from qbatch.core.errors import one_line
from qbatch.worker.methods.implementations import weights_of_model

_MOST_SKIPS = 8
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstFault:
    """``module``: the innermost one in which ``error`` was raised. ``called``: those that were called until then, the
    first ones first."""

    error: Exception
    module: str
    called: tuple[str, ...]

    def explain(self, model: Any, inputs: Mapping[str, torch.Tensor], scheme: Scheme) -> str:
        """The module and the error, and the ``--skip-modules`` with which it runs. Spoils ``model``."""
        said = f"{self.module or type(model).__name__} fails ({one_line(self.error)})"
        skips = _mend(model, inputs, self)
        if skips is None:
            return f"{said}; leaving any of the tried layers unquantized does not help"
        return f"{said}; --skip-modules {','.join([*scheme.skip_modules, *skips])} mends it"


def find_first_fault(model: Any, inputs: Mapping[str, torch.Tensor]) -> FirstFault | None:
    """Run ``model`` once. None if it runs."""
    running: list[str] = []
    called: dict[str, None] = {}
    with _watched(model, running, called), torch.inference_mode():
        try:
            model(**inputs)
        except Exception as error:  # whatever a model's code raises is what is asked for
            # The traceback would keep the model in memory.
            return FirstFault(
                error=error.with_traceback(None), module=running[-1] if running else "", called=tuple(called)
            )
    return None


@contextmanager
def _watched(model: Any, running: list[str], called: dict[str, None]) -> Iterator[None]:
    """Note which modules were ``called``, and those that are ``running``, the innermost last."""

    def enter(name: str) -> Any:
        def hook(_module: Any, _args: Any) -> None:
            running.append(name)
            called[name] = None

        return hook

    def leave(_module: Any, _args: Any, _output: Any) -> None:
        running.pop()

    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mend(model: Any, inputs: Mapping[str, torch.Tensor], fault: FirstFault) -> list[str] | None:
    """The ends of the names of the layers that have to stay unquantized; None if none were found."""
    skips: list[str] = []
    now: FirstFault | None = fault
    while now is not None:
        if len(skips) >= _MOST_SKIPS:
            return None
        ends = _one_that_helps(model, inputs, now) or _several_that_help(model, inputs, now)
        if not ends:
            return None
        skips += ends
        now = find_first_fault(model, inputs)
    return skips


def _one_that_helps(model: Any, inputs: Mapping[str, torch.Tensor], fault: FirstFault) -> list[str]:
    """The first of the suspects that, unquantized, lets the pass get further. It stays unquantized. A layer before the
    fault is one too: models ask a weight for its dtype, and pass on what others cannot compute with."""
    for end in [*_suspects(model, fault), *_ends(model, fault.called)]:
        replaced = _replace(model, end)
        if _gets_further(model, inputs, fault):
            return [end]
        _restore(model, replaced)
    return []


def _several_that_help(model: Any, inputs: Mapping[str, torch.Tensor], fault: FirstFault) -> list[str]:
    """Those of the suspects that have to be unquantized together, as the projections of an attention of PyTorch's."""
    replaced = {end: _replace(model, end) for end in _suspects(model, fault)}
    if not _gets_further(model, inputs, fault):
        for modules in replaced.values():
            _restore(model, modules)
        return []
    needed = []
    for end, modules in replaced.items():
        _restore(model, modules)
        if not _gets_further(model, inputs, fault):
            _replace(model, end)
            needed.append(end)
    return needed


def _gets_further(model: Any, inputs: Mapping[str, torch.Tensor], fault: FirstFault) -> bool:
    after = find_first_fault(model, inputs)
    return after is None or set(after.called) > set(fault.called)


def _suspects(model: Any, fault: FirstFault) -> list[str]:
    """The ends of the names of quantized layers at or under the fault, first those that were not called: a module that
    reads their weights itself does not call them."""
    place = f"{fault.module}." if fault.module else ""
    under = [name for name in _quantized(model) if name == fault.module or name.startswith(place)]
    return _ends(model, sorted(under, key=lambda name: name in fault.called))


def _ends(model: Any, names: Collection[str]) -> list[str]:
    """The ends of those of ``names`` that are quantized layers."""
    quantized = _quantized(model)
    return list(dict.fromkeys(_end_of(name, quantized) for name in names if name in quantized))


def _quantized(model: Any) -> dict[str, Any]:
    weights = weights_of_model(model)
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and weights.is_quantized(module.weight)
    }


def _end_of(name: str, quantized: Iterable[str]) -> str:
    """The shortest end of ``name`` that, among the ``quantized`` layers, only the same layers of other blocks have."""
    parts, kind = name.split("."), _NUMBER.sub("*", name)
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if parts[-count].isdigit():
            break
        if all(_NUMBER.sub("*", other) == kind for other in quantized if other.endswith(end)):
            return end
    return parts[-1]


def _replace(model: Any, end: str) -> dict[str, Any]:
    """Put unquantized layers of the same shapes in place of all quantized ones whose names end so. Returns these.

    Their values do not matter for whether the model runs, so they take no memory.
    """
    replaced = {name: module for name, module in _quantized(model).items() if name.endswith(end)}
    for name, module in replaced.items():
        rows, columns = module.out_features, module.in_features
        plain = torch.nn.Linear(columns, rows, bias=module.bias is not None, device="meta")
        zero = torch.zeros((), dtype=model.dtype, device=module.weight.device)
        plain.weight = torch.nn.Parameter(zero.expand(rows, columns), requires_grad=False)
        if module.bias is not None:
            plain.bias = torch.nn.Parameter(zero.expand(rows), requires_grad=False)
        model.set_submodule(name, plain)
    return replaced


def _restore(model: Any, replaced: Mapping[str, Any]) -> None:
    for name, module in replaced.items():
        model.set_submodule(name, module)
