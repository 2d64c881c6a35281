"""The bytes and operations that one decode step needs at least, whatever its kernels: compared with the roofs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qbatch.core.errors import BenchmarkError
from qbatch.worker.measuring.speed.size import held_bytes
from qbatch.worker.methods.implementations import weights_of_model

_EXPERT_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE_EXPERT_FIELDS = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """The work of one decode step for the whole batch.

    ``weight_bytes``: weights read, including quantization state. A tied head counts once, embedding tables not at all
    (only a few rows are read), and of a mixture's experts only as many as the batch can choose. ``cache_bytes``: keys
    and values read. ``flops``: two for each weight and sequence; those of attention itself are left out, since they
    are few at these lengths.
    """

    weight_bytes: int
    cache_bytes: int
    flops: float

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes


def step_work(model: Any, cache: Any, *, batch_size: int) -> StepWork:
    """The work of a decode step of ``model`` with the keys and values in ``cache``.

    Raises BenchmarkError for a mixture of experts whose config does not say how many experts each token uses.
    """
    config = model.config.get_text_config()
    # Experts that any of the sequences can choose are read, and each sequence computes with its own.
    read, used = active_expert_share(config, batch_size), active_expert_share(config, 1)
    weights = weights_of_model(model)
    weight_bytes, elements = 0.0, 0.0
    for module, parameters, is_expert in _weights_read(model):
        part_read, part_used = (read, used) if is_expert else (1.0, 1.0)
        if part_read is None or part_used is None:
            raise BenchmarkError("the config does not say how many of its experts each token uses")
        held = sum(tensor.nbytes for p in parameters for tensor in weights.held(p))
        weight_bytes += part_read * (held + held_bytes(weights.state(module)))
        elements += part_used * sum(weights.logical_elements(p) for p in parameters)
    return StepWork(weight_bytes=round(weight_bytes), cache_bytes=cache_bytes(cache), flops=2.0 * elements * batch_size)


def active_expert_share(config: Any, batch_size: int) -> float | None:
    """The largest share of a mixture's experts that a step of ``batch_size`` sequences can choose.

    None if the text model's ``config`` does not tell.
    """
    configs = _with_subconfig(config)
    active, total = _first_count(configs, _ACTIVE_EXPERT_FIELDS), _first_count(configs, _EXPERT_COUNT_FIELDS)
    return None if active is None or total is None else min(1.0, batch_size * active / total)


def _with_subconfig(config: Any) -> tuple[Any, ...]:
    # DBRX has these fields one level down.
    return config, getattr(config, "ffn_config", None)


def _first_count(configs: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    """The first of the fields ``names`` that holds a count, or a list with the same count for all layers."""
    for value in (getattr(config, name, None) for config in configs for name in names):
        counts = set(value) if isinstance(value, list) else {value}
        count = counts.pop() if len(counts) == 1 else None
        if isinstance(count, int) and count > 0:
            return count
    return None


def _weights_read(model: Any) -> Iterator[tuple[Any, list[torch.Tensor], bool]]:
    """Yield (module, its own weights that a step reads, whether they are experts of a mixture), each weight once."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    experts = _first_count(_with_subconfig(model.config.get_text_config()), _EXPERT_COUNT_FIELDS)
    seen: set[int] = set()
    for name, module in _decoding_modules(model):
        if id(module) in seen:
            continue
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        if isinstance(module, torch.nn.Embedding):
            # A step reads only a few rows of a table, whether of tokens, of positions or of a layer.
            own = [p for p in own if p is head]
        seen.update(id(thing) for thing in (module, *own))
        # JetMoE names its stacked experts differently.
        is_stack = any(p.dim() == 3 and len(p) == experts for p in own)
        yield module, own, is_stack or "experts" in name.split(".")


def _decoding_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modules that decode, by name: of a multimodal model, only the text decoder and the head."""
    decoder, table, head = _decoder(model), model.get_input_embeddings(), model.get_output_embeddings()
    if decoder is None or all(module is not table for module in decoder.modules()):
        yield from model.named_modules()
        return
    yield from decoder.named_modules()
    if head is not None:
        yield from head.named_modules()


def _decoder(model: Any) -> Any:
    """The text decoder of a multimodal model. None for other models, whose modules all count."""
    if model.config.get_text_config() is model.config:
        return None
    decoder = getattr(model, "get_decoder", lambda: None)()
    return decoder if isinstance(decoder, torch.nn.Module) else None


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a transformers cache."""
    layers = getattr(cache, "layers", [])
    tensors = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
