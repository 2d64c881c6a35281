"""What one decode step must move and compute, whatever the kernels: the work that a roof is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from worker.benchmark.size import held_bytes, logical_elements, quant_state

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Of one decode step for the whole batch. ``weight_bytes``: weights read, with quantization state, a tied head
    once, of experts only as many as the batch can choose; ``cache_bytes``: keys and values read; ``flops``: two
    for each weight and sequence (attention's own are left out: at these lengths they are few)."""

    weight_bytes: int
    cache_bytes: int
    flops: float

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes


def step_work(model: Any, cache: Any, *, batch_size: int) -> StepWork:
    """The work of a step of ``model`` with the keys and values in ``cache``."""
    share = active_expert_share(model.config.get_text_config(), batch_size)
    looked_up = _lookup_only(model)
    weight_bytes, elements = 0.0, 0.0
    seen: set[int] = set()
    for name, module in model.named_modules():
        part = share if "experts" in name.split(".") else 1.0
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or parameter is looked_up:
                continue
            seen.add(id(parameter))
            weight_bytes += part * parameter.nbytes
            elements += part * logical_elements(parameter)
        weight_bytes += part * held_bytes(quant_state(module))
    return StepWork(weight_bytes=round(weight_bytes), cache_bytes=cache_bytes(cache), flops=2.0 * elements * batch_size)


def active_expert_share(config: Any, batch_size: int) -> float:
    """The largest part of a mixture's experts that a step of ``batch_size`` sequences can choose; 1 without one."""
    chosen = getattr(config, "num_experts_per_tok", None)
    total = next((n for name in _EXPERT_COUNTS if isinstance(n := getattr(config, name, None), int)), None)
    if not chosen or not total:
        return 1.0
    return min(1.0, batch_size * int(chosen) / total)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache of transformers holds."""
    layers = getattr(cache, "layers", [])
    tensors = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def _lookup_only(model: Any) -> torch.Tensor | None:
    """The input embedding, unless it is the output head too: a step reads a few of its rows."""
    embedding: torch.Tensor = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    return None if head is not None and head.weight is embedding else embedding
