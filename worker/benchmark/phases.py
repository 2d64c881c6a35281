"""The phases that a task is timed in, at a shape that fits the model: prefill and decode, or one forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from models_db.domain import Protocol
from worker.architecture import Task
from worker.benchmark.clock import clock_of
from worker.benchmark.memory import MemoryWatch
from worker.benchmark.speed import time_forward, time_generation
from worker.benchmark.stats import summarize
from worker.benchmark.tokens import max_positions, prompts
from worker.load import Loaded

_GENERATIVE = (Task.CAUSAL_LM, Task.SEQ2SEQ)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """``columns`` of the measurement, full ``stats`` by phase, and the ``prompts`` [batch, length] that were read.
    ``new_tokens`` is 0 where nothing is generated."""

    columns: Mapping[str, float]
    stats: Mapping[str, Any]
    prompts: torch.Tensor
    new_tokens: int

    @property
    def shapes(self) -> dict[str, int]:
        batch_size, prompt_tokens = self.prompts.shape
        return {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "new_tokens": self.new_tokens}


def measure_speed(loaded: Loaded, protocol: Protocol, eval_text: str, watch: MemoryWatch) -> Speed:
    """Time the phases of the model's task; ``watch`` is open during the warm-up."""
    return (_generation if loaded.task in _GENERATIVE else _forward)(loaded, protocol, eval_text, watch)


def _generation(loaded: Loaded, protocol: Protocol, eval_text: str, watch: MemoryWatch) -> Speed:
    prompt_tokens, new_tokens = generation_shape(protocol, max_positions(loaded.model))
    ids = prompts(loaded, eval_text, batch_size=protocol.batch_size, length=prompt_tokens)
    times = time_generation(
        loaded.model,
        ids,
        new_tokens=new_tokens,
        protocol=protocol,
        clock=clock_of(loaded.device),
        during_warmup=watch,
    )
    prefill, decode, per_token = summarize(times.prefill_s), summarize(times.decode_s), summarize(times.per_token_s)
    return Speed(
        columns={
            "prefill_s_p50": prefill.p50,
            "per_token_s_p50": per_token.p50,
            "per_token_s_p99": per_token.p99,
            "decode_tokens_per_s": protocol.batch_size * (new_tokens - 1) / decode.mean,
        },
        stats={
            "prefill": asdict(prefill) | {"tokens_per_s": ids.numel() / prefill.mean},
            "decode": asdict(decode),
            "per_token": asdict(per_token),
        },
        prompts=ids,
        new_tokens=new_tokens,
    )


def generation_shape(protocol: Protocol, limit: int | None) -> tuple[int, int]:
    """(prompt tokens, new tokens) that fit ``limit`` positions; the prompt yields first."""
    if limit is None or protocol.prompt_tokens + protocol.new_tokens <= limit:
        return protocol.prompt_tokens, protocol.new_tokens
    new_tokens = max(2, min(protocol.new_tokens, limit // 2))
    return max(1, min(protocol.prompt_tokens, limit - new_tokens)), new_tokens


def _forward(loaded: Loaded, protocol: Protocol, eval_text: str, watch: MemoryWatch) -> Speed:
    limit = max_positions(loaded.model)
    length = protocol.prompt_tokens if limit is None else min(protocol.prompt_tokens, limit)
    ids = prompts(loaded, eval_text, batch_size=protocol.batch_size, length=length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if loaded.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    times_s = time_forward(loaded.model, inputs, protocol=protocol, clock=clock_of(loaded.device), during_warmup=watch)
    forward = summarize(times_s)
    return Speed(
        columns={"forward_s_p50": forward.p50, "forward_samples_per_s": protocol.batch_size / forward.mean},
        stats={"forward": asdict(forward)},
        prompts=ids,
        new_tokens=0,
    )
