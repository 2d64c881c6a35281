"""How far 16-bit arithmetic by itself moves a model's predictions: what is below is noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from worker.benchmark.divergence import Divergence, divergence, summarize_divergence
from worker.benchmark.probes import Probe
from worker.benchmark.replay import logits_of
from worker.load import Loaded

_PROBES = 2
_FIGURES = ("kl_mean", "kl_median", "kl_p99", "top1_agreement", "ln_ppl_ratio", "rms_delta_p")


def arithmetic_floor(loaded: Loaded, probes: Sequence[Probe]) -> dict[str, Any] | None:
    """The divergence of the unquantized model in ``loaded`` from itself computed in float32, on the first probes.

    The same weights and the same text, so all of it is rounding. None for a model that is float32 already, and
    where the device has no room for the float32 copy.
    """
    if all(parameter.dtype == torch.float32 for parameter in loaded.model.parameters()):
        return None
    probes = probes[:_PROBES]
    rounded = [logits_of(loaded.model, probe, loaded.device).cpu() for probe in probes]
    try:
        with _in_float32(loaded.model):
            found = [_from_float32(loaded, probe, logits) for probe, logits in zip(probes, rounded, strict=True)]
    except torch.OutOfMemoryError:
        return None
    summary = summarize_divergence(found)
    return {name: summary[name] for name in ("windows", "rows", *_FIGURES) if name in summary}


def _from_float32(loaded: Loaded, probe: Probe, rounded: torch.Tensor) -> Divergence:
    exact = logits_of(loaded.model, probe, loaded.device)
    return divergence(exact, rounded.to(loaded.device), probe.targets)


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Weights in float32 inside; outside as they were, to the bit, since every 16-bit float is a float32."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    before = [tensor.dtype for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor.data = tensor.data.to(dtype)
