"""The slope of the KL divergence towards 16 bits, for all groups of layers at once, by one backward pass a window.

With all layers quantized, a weight W is the point α = 0 of the line W + α·ΔW, which reaches its 16-bit values at α = 1.
The slope of the KL in α is ⟨∂KL/∂W, ΔW⟩ = Σ over tokens of ⟨∂KL/∂y, ΔW·x⟩, for a layer that computes y = W·x. So no
gradient of a weight is ever held, and only the layers' inputs are kept until the backward pass reaches them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qbatch.worker.measuring.quality.divergence import Divergence, divergence
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.quality.replay import forward_logits
from qbatch.worker.searching.graphs import frozen, with_graph
from qbatch.worker.searching.mixed_model import MixedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSlopes:
    """The slope of the sum of one window's KL for each layer, and how far the model was from its base there."""

    slopes: dict[str, float]
    divergence: Divergence


def window_slopes(mixed: MixedModel, probe: Probe, device: str, base_logits: torch.Tensor) -> WindowSlopes:
    """One forward and one backward pass at the mixture that ``mixed`` is now, towards each quantized layer's 16 bits.
    A layer that the window does not reach has no slope, nor has one that runs where the model turns gradients off (of
    what chooses keys, an index comes out)."""
    slopes: defaultdict[str, Any] = defaultdict(float)
    with torch.enable_grad(), frozen(mixed.model), _contracting(mixed, slopes):
        logits = forward_logits(mixed.model, probe, device)
        gradient, scale = _gradient(logits.detach(), base_logits)
        found = divergence(base_logits, logits.detach(), probe.targets)
        torch.autograd.backward(logits, gradient)
    return WindowSlopes(slopes={name: float(total) / scale for name, total in slopes.items()}, divergence=found)


@torch.no_grad()
def _gradient(logits: torch.Tensor, base_logits: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The gradient of Σ KL over the rows, which is q - p, times a power of two that brings its largest entry near 1:
    at 16 bits, what is propagated further might be too small otherwise."""
    gradient = logits.float().softmax(-1) - base_logits.float().softmax(-1)
    largest = float(gradient.abs().amax())
    if not 0 < largest < float("inf"):
        return gradient.to(logits.dtype), 1.0
    scale = 2.0 ** -torch.tensor(largest).log2().floor().item()
    return gradient.mul_(scale).to(logits.dtype), scale


@contextmanager
def _contracting(mixed: MixedModel, slopes: defaultdict[str, Any]) -> Iterator[None]:
    hooks = [
        module.register_forward_hook(partial(_watch_output, mixed, slopes, name))
        for name, module in mixed.linears().items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watch_output(
    mixed: MixedModel,
    slopes: defaultdict[str, Any],
    name: str,
    _module: Any,
    args: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return output
    watched = with_graph(output)
    contract = partial(_contract, mixed, slopes, name, args[0].detach())
    watched.register_hook(contract)  # type: ignore[no-untyped-call]
    return watched


@torch.no_grad()
def _contract(
    mixed: MixedModel, slopes: defaultdict[str, Any], name: str, inputs: torch.Tensor, gradient: torch.Tensor
) -> None:
    change = mixed.change(name)
    is_turned = not isinstance(mixed.linears()[name], torch.nn.Linear)
    changed = inputs @ (change if is_turned else change.t())
    slopes[name] += torch.sum(gradient.float() * changed.float(), dtype=torch.float64)
