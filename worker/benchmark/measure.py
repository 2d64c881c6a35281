"""One benchmark from end to end: size, speed, memory, quality; size first, since a forward may repack weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models_db.domain import DType, Measurement, Protocol
from models_db.errors import BenchmarkError, Unsupported
from worker.architecture import Task
from worker.benchmark.explain import explain
from worker.benchmark.graph import GraphRequest
from worker.benchmark.memory import allocator_peaks, reset_allocator_peaks, watching
from worker.benchmark.perplexity import TextScore, score_text, text_windows
from worker.benchmark.phases import Speed, measure_speed
from worker.benchmark.reference import Reference, compare
from worker.benchmark.size import disk_bytes, measure_size
from worker.benchmark.versions import device_name, versions
from worker.cpu_kernels import avoid_packed_kernel
from worker.load import Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and by which rules; ``worker.benchmark.benchmark`` says what each field means."""

    loaded: Loaded
    folder: Path
    dtype: DType
    compute_dtype: DType
    protocol: Protocol
    eval_text: str
    on_step: Callable[[str], None]
    reference: Reference | None
    explain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quality:
    """``score`` is of a causal LM alone; ``against_base`` needs a reference."""

    score: TextScore | None
    against_base: Mapping[str, Any] | None


def measure(plan: Plan) -> Measurement:
    """See ``worker.benchmark.benchmark``."""
    loaded = plan.loaded
    if loaded.model.main_input_name != "input_ids":
        raise Unsupported(f"{type(loaded.model).__name__} reads {loaded.model.main_input_name}, not text")
    size = measure_size(loaded.model)
    reset_allocator_peaks(loaded.device)
    plan.on_step("speed")
    with watching(loaded.device) as watch:
        speed = measure_speed(loaded, plan.protocol, plan.eval_text, watch)
    memory = asdict(watch.peaks) | allocator_peaks(loaded.device)
    quality = _measure_quality(plan)
    perplexity = None if quality.score is None else quality.score.perplexity
    against_base = quality.against_base or {}
    return Measurement(
        device_name=device_name(loaded.device),
        dtype=plan.dtype,
        compute_dtype=plan.compute_dtype,
        num_parameters=size.num_parameters,
        quantized_fraction=size.quantized_fraction,
        bits_per_param=size.bits_per_param,
        disk_bytes=disk_bytes(plan.folder),
        memory_footprint_bytes=size.memory_footprint_bytes,
        weights_bytes=size.weights_bytes,
        max_allocated_bytes=memory["max_allocated"],
        load_model_s=loaded.load_model_s,
        perplexity=finite(perplexity),
        kl_mean=finite(against_base.get("kl_mean")),
        top1_agreement=finite(against_base.get("top1_agreement")),
        details={
            "task": loaded.task.value,
            "protocol": plan.protocol.to_json(),
            "protocol_hash": plan.protocol.hash,
            "versions": versions(),
            "size": asdict(size),
            "memory": memory,
            "shapes": speed.shapes,
            "stats": dict(speed.stats),
            "perplexity": finite(None if quality.score is None else _score_details(quality.score)),
            "quality": finite(quality.against_base),
            "why": finite(_explain(plan, speed)),
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


def _measure_quality(plan: Plan) -> _Quality:
    loaded, against_base = plan.loaded, None
    if plan.reference is not None:
        plan.on_step("quality")
        against_base = _compare(loaded, plan.reference, plan)
    # Perplexity has no meaning for other tasks, nor over random ids in place of a text.
    if loaded.task is not Task.CAUSAL_LM or loaded.tokenizer is None:
        return _Quality(score=None, against_base=against_base)
    cut = text_windows(loaded, plan.protocol, plan.eval_text)
    if against_base is not None and len(against_base.get("window_nll", ())) == len(cut):
        # The comparison has scored the same windows.
        nll, tokens = against_base["window_nll"], against_base["window_tokens"]
        score = TextScore(window_nll=tuple(nll), window_tokens=tuple(tokens))
        return _Quality(score=score, against_base=against_base)
    scored = score_text(loaded, cut, lambda number: plan.on_step(f"perplexity {number}/{len(cut)}"))
    return _Quality(score=scored, against_base=against_base)


def _compare(loaded: Loaded, reference: Reference, plan: Plan) -> dict[str, Any]:
    """What cannot be compared leaves its reason, and the other figures stand."""
    try:
        return compare(loaded, reference, plan.protocol, plan.eval_text)
    except BenchmarkError as error:
        return {"reason": str(error)}


def _explain(plan: Plan, speed: Speed) -> dict[str, Any] | None:
    """None where it was not asked for, and where there is nothing to explain: no GPU, or no decoding."""
    if not plan.explain or plan.loaded.task is not Task.CAUSAL_LM or not plan.loaded.device.startswith("cuda"):
        return None
    return explain(
        plan.loaded,
        GraphRequest(folder=str(plan.folder), dtype=plan.dtype.value, device=plan.loaded.device, **speed.shapes),
        compute_dtype=plan.compute_dtype,
        prompts=speed.prompts,
        step_wall_s=speed.columns["per_token_s_p50"],
        on_step=plan.on_step,
    )


def _score_details(score: TextScore) -> dict[str, Any]:
    return {
        "mean_nll": score.mean_nll,
        "tokens": score.tokens,
        "windows": len(score.window_nll),
        "window_nll": list(score.window_nll),
        "window_tokens": list(score.window_tokens),
    }
