"""What one decode step must move and compute, whatever the kernels: the work that a roof is held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qbatch.core.errors import BenchmarkError
from qbatch.worker.measuring.speed.size import held_bytes
from qbatch.worker.methods.halves import weights_of_model

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_COUNTS = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Of one decode step for the whole batch. ``weight_bytes``: weights read, with quantization state, a tied head
    once, of tables a few rows and so nothing, of experts only as many as the batch can choose; ``cache_bytes``: keys
    and values read; ``flops``: two for each weight and sequence (attention's own are left out: at these lengths they
    are few)."""

    weight_bytes: int
    cache_bytes: int
    flops: float

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes


def step_work(model: Any, cache: Any, *, batch_size: int) -> StepWork:
    """The work of a step of ``model`` with the keys and values in ``cache``.

    Raises BenchmarkError for a mixture whose config does not say how many experts are chosen.
    """
    share = active_expert_share(model.config.get_text_config(), batch_size)
    weights = weights_of_model(model)
    weight_bytes, elements = 0.0, 0.0
    for module, parameters, is_expert in _read(model):
        if is_expert and share is None:
            raise BenchmarkError("the config does not say of how many experts each token takes how many")
        part = share if is_expert and share is not None else 1.0
        held = sum(tensor.nbytes for p in parameters for tensor in weights.held(p))
        weight_bytes += part * (held + held_bytes(weights.state(module)))
        elements += part * sum(weights.logical_elements(p) for p in parameters)
    return StepWork(weight_bytes=round(weight_bytes), cache_bytes=cache_bytes(cache), flops=2.0 * elements * batch_size)


def active_expert_share(config: Any, batch_size: int) -> float | None:
    """The largest part of a mixture's experts that a step of ``batch_size`` sequences can choose; None where the
    text model's ``config`` does not say."""
    places = _places(config)
    chosen, total = _first_count(places, _CHOSEN_COUNTS), _first_count(places, _EXPERT_COUNTS)
    return None if chosen is None or total is None else min(1.0, batch_size * chosen / total)


def _places(config: Any) -> tuple[Any, ...]:
    # DBRX says it one level down.
    return config, getattr(config, "ffn_config", None)


def _first_count(places: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    """Of the fields ``names``, the first that holds a count; a list is one where all layers have the same."""
    for value in (getattr(place, name, None) for place in places for name in names):
        counts = set(value) if isinstance(value, list) else {value}
        count = counts.pop() if len(counts) == 1 else None
        if isinstance(count, int) and count > 0:
            return count
    return None


def _read(model: Any) -> Iterator[tuple[Any, list[torch.Tensor], bool]]:
    """(module, the weights of its own that a step reads, whether it is of a mixture's experts), each weight once."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    experts = _first_count(_places(model.config.get_text_config()), _EXPERT_COUNTS)
    seen: set[int] = set()
    for name, module in _decoding(model):
        if id(module) in seen:
            continue
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        if isinstance(module, torch.nn.Embedding):
            # A few rows of the table: of the vocabulary's, of the positions', of those that each layer may have.
            own = [p for p in own if p is head]
        seen.update(id(thing) for thing in (module, *own))
        # JetMoE has stacks of experts under other names.
        is_stack = any(p.dim() == 3 and len(p) == experts for p in own)
        yield module, own, is_stack or "experts" in name.split(".")


def _decoding(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that decode, by name: of a model that also sees or hears, the text's decoder and the head alone."""
    decoder, table, head = _decoder(model), model.get_input_embeddings(), model.get_output_embeddings()
    if decoder is None or all(module is not table for module in decoder.modules()):
        yield from model.named_modules()
        return
    yield from decoder.named_modules()
    if head is not None:
        yield from head.named_modules()


def _decoder(model: Any) -> Any:
    """Of a model that is more than text; None of others, whose parts between decoder and head count too."""
    if model.config.get_text_config() is model.config:
        return None
    found = getattr(model, "get_decoder", lambda: None)()
    return found if isinstance(found, torch.nn.Module) else None


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache of transformers holds."""
    layers = getattr(cache, "layers", [])
    tensors = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
