"""Where a forward pass of a quantized model fails, and which layers have to stay unquantized for it to run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
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
    """``module``: the innermost one in which ``error`` was raised. ``called``: those that were called until then."""

    error: Exception
    module: str
    called: frozenset[str]

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
    called: set[str] = set()
    with _watched(model, running, called), torch.inference_mode():
        try:
            model(**inputs)
        except Exception as error:  # whatever a model's code raises is what is asked for
            # The traceback would keep the model in memory.
            return FirstFault(
                error=error.with_traceback(None), module=running[-1] if running else "", called=frozenset(called)
            )
    return None


@contextmanager
def _watched(model: Any, running: list[str], called: set[str]) -> Iterator[None]:
    """Note which modules were ``called``, and those that are ``running``, the innermost last."""

    def enter(name: str) -> Any:
        def hook(_module: Any, _args: Any) -> None:
            running.append(name)
            called.add(name)

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
        if len(skips) == _MOST_SKIPS:
            return None
        for end in _suspects(model, now):
            replaced = _replace(model, end)
            after = find_first_fault(model, inputs)
            if after is None or after.called > now.called:
                skips.append(end)
                now = after
                break
            _restore(model, replaced)
        else:
            return None
    return skips


def _suspects(model: Any, fault: FirstFault) -> list[str]:
    """The ends of the names of quantized layers at or under the fault, first those that were not called: a module that
    reads their weights itself does not call them."""
    quantized = _quantized(model)
    place = f"{fault.module}." if fault.module else ""
    under = [name for name in quantized if name == fault.module or name.startswith(place)]
    under.sort(key=lambda name: name in fault.called)
    return list(dict.fromkeys(_end_of(name, quantized) for name in under))


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

    Their values do not matter for whether the model runs.
    """
    replaced = {name: module for name, module in _quantized(model).items() if name.endswith(end)}
    for name, module in replaced.items():
        plain = torch.nn.Linear(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            dtype=model.dtype,
            device=module.weight.device,
        )
        model.set_submodule(name, plain)
    return replaced


def _restore(model: Any, replaced: Mapping[str, Any]) -> None:
    for name, module in replaced.items():
        model.set_submodule(name, module)
