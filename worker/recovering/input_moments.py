"""The second moments of what the layers of a model read, gathered from passes over a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.quality.replay import logits_of
from qbatch.worker.searching.input_trace import trace_inputs

Moments = Mapping[str, torch.Tensor | None]
"""By layer, the mean of x·xᵀ over its inputs x [columns]; None for a layer that the text does not reach."""


def exact_dtype(device: str) -> torch.dtype:
    """What moments and factors are computed in. Most GPUs are slow in float64."""
    return torch.float32 if device.startswith("cuda") else torch.float64


def input_moments(
    model: Any, layers: Mapping[str, Any], probes: Sequence[Probe], device: str, *, most_bytes: int
) -> Iterator[Moments]:
    """The moments of ``layers`` (modules of ``model`` by name), for as many of them at a time as take at most
    ``most_bytes``. Each time the model reads all ``probes``."""
    for part in _parts(_shared(model, layers, probes[0], device), layers, exact_dtype(device).itemsize, most_bytes):
        sums = _gathered(model, {first: layers[first] for first in part}, probes, device)
        yield {name: sums.get(first) for first, names in part.items() for name in names}


def _shared(model: Any, layers: Mapping[str, Any], probe: Probe, device: str) -> dict[str, list[str]]:
    """The layers that read the same, by the first of them: query, key and value need one sum."""
    trace = trace_inputs(model, layers, {}, probe, device)
    first_of = {name: min(readers) for readers in trace.readers for name in readers}
    shared: dict[str, list[str]] = {}
    for name in layers:
        shared.setdefault(first_of.get(name, name), []).append(name)
    return shared


def _parts(
    shared: Mapping[str, list[str]], layers: Mapping[str, Any], itemsize: int, most_bytes: int
) -> Iterator[Mapping[str, list[str]]]:
    part: dict[str, list[str]] = {}
    taken = 0
    for first, names in shared.items():
        nbytes = layers[first].in_features ** 2 * itemsize
        if part and taken + nbytes > most_bytes:
            yield part
            part, taken = {}, 0
        part[first], taken = names, taken + nbytes
    yield part


def _gathered(model: Any, layers: Mapping[str, Any], probes: Sequence[Probe], device: str) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(layers, 0)
    hooks = [
        module.register_forward_pre_hook(partial(_add, sums, counts, name, exact_dtype(device)), with_kwargs=True)
        for name, module in layers.items()
    ]
    try:
        for probe in probes:
            logits_of(model, probe, device)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def _add(
    sums: dict[str, torch.Tensor],
    counts: dict[str, int],
    name: str,
    dtype: torch.dtype,
    _module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    value = args[0] if args else next(iter(kwargs.values()))
    rows = value.detach().reshape(-1, value.shape[-1]).to(dtype)
    products = rows.T @ rows
    counts[name] += len(rows)
    if name in sums:
        sums[name] += products
    else:
        sums[name] = products
