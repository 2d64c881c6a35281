"""Time the phases of a model at a shape that fits it: prefill and decode, or forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qbatch.core.domain import Protocol
from qbatch.core.measured.speed_figures import Phase
from qbatch.worker.measuring.speed.device_clock import clock_of
from qbatch.worker.measuring.speed.fairness import GpuConditions, fairness_monitor
from qbatch.worker.measuring.speed.generation import WarmedShapes, time_forward, time_generation
from qbatch.worker.measuring.speed.model_inputs import describe_inputs, noise_inputs, reads_text, text_inputs
from qbatch.worker.measuring.speed.noise_forms import Inputs
from qbatch.worker.measuring.tokens import max_positions, prompts
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel

_GENERATIVE = (ModelKind.CAUSAL_LM, ModelKind.SEQ2SEQ)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedShape:
    """The shape that was timed."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The times of one round in seconds, by phase (prefill, decode and per token, or forward).

    ``prompts``: [batch, length]. ``new_tokens``: 0 if nothing is generated. ``conditions``: None without a GPU.
    ``noise``: the inputs of a model that does not read text alone, whose prompts have no tokens.
    """

    times_s: Mapping[Phase, list[float]]
    prompts: torch.Tensor
    new_tokens: int
    conditions: GpuConditions | None
    noise: str | None = None

    @property
    def shape(self) -> TimedShape:
        batch_size, prompt_tokens = self.prompts.shape
        return TimedShape(batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=self.new_tokens)


def time_round(
    loaded: LoadedModel,
    protocol: Protocol,
    eval_text: str,
    during_warmup: AbstractContextManager[object],
    warmed: WarmedShapes,
    noise: Inputs | None,
) -> Round:
    """Time one round of the model's phases. ``warmed``: as for ``time_generation``. ``noise``: the inputs of a model
    that does not read text alone (``noise_for``)."""
    time_phases = partial(_generation, warmed=warmed) if loaded.kind in _GENERATIVE else _forward
    with fairness_monitor(loaded.device) as fairness:
        options = {
            "clock": clock_of(loaded.device),
            "during_warmup": during_warmup,
            "between_iterations": fairness.sample,
        }
        if noise is not None:
            return _noise_round(loaded, protocol, noise, options, fairness.conditions)
        times_s, ids, new_tokens = time_phases(loaded, protocol, eval_text, options)
        return Round(times_s=times_s, prompts=ids, new_tokens=new_tokens, conditions=fairness.conditions())


def noise_for(loaded: LoadedModel, protocol: Protocol) -> Inputs | None:
    """Inputs for a model that does not read text alone, else None. Finding them takes passes that use memory. Raises
    Unsupported if none are known."""
    return None if reads_text(loaded.model) else noise_inputs(loaded.model, protocol.batch_size)


def _noise_round(
    loaded: LoadedModel,
    protocol: Protocol,
    noise: Inputs,
    options: Mapping[str, Any],
    conditions: Callable[[], GpuConditions | None],
) -> Round:
    times_s = time_forward(loaded.model, noise, protocol=protocol, **options)
    return Round(
        times_s={Phase.FORWARD: times_s},
        prompts=torch.empty(protocol.batch_size, 0, dtype=torch.long),
        new_tokens=0,
        conditions=conditions(),
        noise=describe_inputs(noise),
    )


def untimed_round(loaded: LoadedModel, protocol: Protocol, eval_text: str) -> Round:
    """The prompts of a round of generation, of which nothing is timed."""
    prompt_tokens, new_tokens = generation_shape(protocol, max_positions(loaded.model))
    ids = prompts(loaded, eval_text, batch_size=protocol.batch_size, length=prompt_tokens)
    return Round(times_s={}, prompts=ids, new_tokens=new_tokens, conditions=None)


_Timed = tuple[Mapping[Phase, list[float]], torch.Tensor, int]


def _generation(
    loaded: LoadedModel, protocol: Protocol, eval_text: str, options: Mapping[str, Any], *, warmed: WarmedShapes
) -> _Timed:
    shape = untimed_round(loaded, protocol, eval_text)
    times = time_generation(
        loaded.model, shape.prompts, new_tokens=shape.new_tokens, protocol=protocol, warmed=warmed, **options
    )
    phases = {Phase.PREFILL: times.prefill_s, Phase.DECODE: times.decode_s, Phase.PER_TOKEN: times.per_token_s}
    return phases, shape.prompts, shape.new_tokens


def generation_shape(protocol: Protocol, limit: int | None) -> tuple[int, int]:
    """(prompt tokens, new tokens) that fit ``limit`` positions. The prompt is shortened first."""
    if limit is None or protocol.prompt_tokens + protocol.new_tokens <= limit:
        return protocol.prompt_tokens, protocol.new_tokens
    new_tokens = max(2, min(protocol.new_tokens, limit // 2))
    return max(1, min(protocol.prompt_tokens, limit - new_tokens)), new_tokens


def _forward(loaded: LoadedModel, protocol: Protocol, eval_text: str, options: Mapping[str, Any]) -> _Timed:
    limit = max_positions(loaded.model)
    length = protocol.prompt_tokens if limit is None else min(protocol.prompt_tokens, limit)
    ids = prompts(loaded, eval_text, batch_size=protocol.batch_size, length=length)
    inputs = text_inputs(loaded.model, ids)
    return {Phase.FORWARD: time_forward(loaded.model, inputs, protocol=protocol, **options)}, ids, 0
