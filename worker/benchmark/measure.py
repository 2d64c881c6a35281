"""One benchmark from end to end: size, speed, memory, quality; size first, since a forward may repack weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from models_db.domain import DType, Measurement, Protocol, Scheme
from models_db.errors import Unsupported
from worker.architecture import Task
from worker.benchmark.clock import clock_of
from worker.benchmark.perplexity import TextScore, score_text, text_windows
from worker.benchmark.reference import Reference, compare
from worker.benchmark.size import disk_bytes, measure_size
from worker.benchmark.speed import time_forward, time_generation
from worker.benchmark.stats import summarize
from worker.benchmark.tokens import max_positions, prompts
from worker.benchmark.versions import device_name, versions
from worker.cpu_kernels import avoid_packed_kernel
from worker.load import Loaded

_GENERATIVE = (Task.CAUSAL_LM, Task.SEQ2SEQ)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Speed:
    """Columns of the measurement, and what goes into its details."""

    columns: Mapping[str, float] = field(default_factory=dict)
    stats: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quality:
    """``score`` is of a causal LM alone; ``against_base`` needs a reference."""

    score: TextScore | None
    against_base: Mapping[str, Any] | None


def measure(
    loaded: Loaded,
    *,
    folder: Path,
    scheme: Scheme,
    dtype: DType,
    protocol: Protocol,
    eval_text: str,
    on_step: Callable[[str], None],
    reference: Reference | None,
) -> Measurement:
    """See ``worker.benchmark.benchmark``."""
    if loaded.model.main_input_name != "input_ids":
        raise Unsupported(f"{type(loaded.model).__name__} reads {loaded.model.main_input_name}, not text")
    size = measure_size(loaded.model)
    _reset_peak(loaded.device)
    on_step("speed")
    speed = _measure_speed(loaded, protocol, eval_text)
    peak_bytes = _peak(loaded.device)
    quality = _measure_quality(loaded, protocol, eval_text, on_step, reference)
    perplexity = None if quality.score is None else quality.score.perplexity
    return Measurement(
        device_name=device_name(loaded.device),
        dtype=dtype,
        compute_dtype=scheme.resolved(dtype).compute_dtype,
        num_parameters=size.num_parameters,
        quantized_fraction=size.quantized_fraction,
        bits_per_param=size.bits_per_param,
        disk_bytes=disk_bytes(folder),
        memory_footprint_bytes=size.memory_footprint_bytes,
        weights_bytes=size.weights_bytes,
        max_allocated_bytes=peak_bytes,
        load_model_s=loaded.load_model_s,
        perplexity=finite(perplexity),
        details={
            "task": loaded.task.value,
            "protocol": protocol.to_json(),
            "protocol_hash": protocol.hash,
            "versions": versions(),
            "size": asdict(size),
            "shapes": dict(speed.shapes),
            "stats": dict(speed.stats),
            "perplexity": finite(None if quality.score is None else _score_details(quality.score)),
            "quality": finite(quality.against_base),
            "audits": {
                "cpu_layers_on_generic_kernel": avoid_packed_kernel(loaded.model, loaded.device),
                "perplexity_not_finite": perplexity is not None and not math.isfinite(perplexity),
            },
        },
        **speed.columns,
    )


def finite(value: Any) -> Any:
    """``value`` with every infinity and not-a-number in it replaced by None: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def _measure_speed(loaded: Loaded, protocol: Protocol, eval_text: str) -> _Speed:
    return (_generation if loaded.task in _GENERATIVE else _forward)(loaded, protocol, eval_text)


def _generation(loaded: Loaded, protocol: Protocol, eval_text: str) -> _Speed:
    prompt_tokens, new_tokens = _generation_shape(protocol, max_positions(loaded.model))
    ids = prompts(loaded, eval_text, batch_size=protocol.batch_size, length=prompt_tokens)
    times = time_generation(loaded.model, ids, new_tokens=new_tokens, protocol=protocol, clock=clock_of(loaded.device))
    prefill, decode, per_token = summarize(times.prefill_s), summarize(times.decode_s), summarize(times.per_token_s)
    return _Speed(
        columns={
            "prefill_s_p50": prefill.p50,
            "per_token_s_p50": per_token.p50,
            "per_token_s_p99": per_token.p99,
            "decode_tokens_per_s": protocol.batch_size * (new_tokens - 1) / decode.mean,
        },
        stats={
            "prefill": asdict(prefill) | {"tokens_per_s": protocol.batch_size * prompt_tokens / prefill.mean},
            "decode": asdict(decode),
            "per_token": asdict(per_token),
        },
        shapes={"batch_size": protocol.batch_size, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens},
    )


def _generation_shape(protocol: Protocol, limit: int | None) -> tuple[int, int]:
    """(prompt tokens, new tokens) that fit the model's positions; the prompt yields first."""
    if limit is None or protocol.prompt_tokens + protocol.new_tokens <= limit:
        return protocol.prompt_tokens, protocol.new_tokens
    new_tokens = max(2, min(protocol.new_tokens, limit // 2))
    return max(1, min(protocol.prompt_tokens, limit - new_tokens)), new_tokens


def _forward(loaded: Loaded, protocol: Protocol, eval_text: str) -> _Speed:
    limit = max_positions(loaded.model)
    length = protocol.prompt_tokens if limit is None else min(protocol.prompt_tokens, limit)
    ids = prompts(loaded, eval_text, batch_size=protocol.batch_size, length=length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if loaded.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    forward = summarize(time_forward(loaded.model, inputs, protocol=protocol, clock=clock_of(loaded.device)))
    return _Speed(
        columns={"forward_s_p50": forward.p50, "forward_samples_per_s": protocol.batch_size / forward.mean},
        stats={"forward": asdict(forward)},
        shapes={"batch_size": protocol.batch_size, "prompt_tokens": length},
    )


def _measure_quality(
    loaded: Loaded,
    protocol: Protocol,
    eval_text: str,
    on_step: Callable[[str], None],
    reference: Reference | None,
) -> _Quality:
    against_base = None
    if reference is not None:
        on_step("quality")
        against_base = compare(loaded, reference, protocol, eval_text)
    # Perplexity has no meaning for other tasks, nor over random ids in place of a text.
    if loaded.task is not Task.CAUSAL_LM or loaded.tokenizer is None:
        return _Quality(score=None, against_base=against_base)
    cut = text_windows(loaded, protocol, eval_text)
    if against_base is not None and len(against_base["window_nll"]) == len(cut):
        # The comparison has scored the same windows.
        nll, tokens = against_base["window_nll"], against_base["window_tokens"]
        score = TextScore(window_nll=tuple(nll), window_tokens=tuple(tokens))
        return _Quality(score=score, against_base=against_base)
    scored = score_text(loaded, cut, lambda number: on_step(f"perplexity {number}/{len(cut)}"))
    return _Quality(score=scored, against_base=against_base)


def _score_details(score: TextScore) -> dict[str, Any]:
    return {
        "mean_nll": score.mean_nll,
        "tokens": score.tokens,
        "windows": len(score.window_nll),
        "window_nll": list(score.window_nll),
        "window_tokens": list(score.window_tokens),
    }


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> int | None:
    return int(torch.cuda.max_memory_allocated(device)) if device.startswith("cuda") else None
