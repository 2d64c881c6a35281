"""Why decoding is as fast as it is, and what it costs in energy: everything about a GPU beyond the plain figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from models_db.domain import DType
from worker.benchmark.energy import NoEnergyCounter, measure_energy
from worker.benchmark.graph import GraphRequest, kernels_alone
from worker.benchmark.memory import nvml_handle
from worker.benchmark.profile import profile_decode
from worker.benchmark.roofs import measure_roofs
from worker.benchmark.speed import greedy
from worker.benchmark.traffic import StepWork, step_work
from worker.benchmark.verdict import judge
from worker.load import Loaded


def explain(
    loaded: Loaded,
    shape: GraphRequest,
    *,
    compute_dtype: DType,
    prompts: torch.Tensor,
    step_wall_s: float,
    on_step: Callable[[str], None],
) -> dict[str, Any]:
    """What lies behind an eager decode step of ``step_wall_s`` seconds of the causal LM in ``loaded`` on CUDA, at
    ``shape``, which is that of ``prompts`` [batch, length]. Takes about a minute; what could not be had is None,
    with a reason. A lack of memory for it is such a reason too, not an error.
    """
    try:
        why = _why(loaded, shape, compute_dtype, prompts, step_wall_s, on_step)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        why = {"verdict": None, "reason": "the GPU has no room left for finding out"}
    on_step("energy")
    return why | {"energy": _energy(loaded, prompts, shape.new_tokens)}


def _why(
    loaded: Loaded,
    shape: GraphRequest,
    compute_dtype: DType,
    prompts: torch.Tensor,
    step_wall_s: float,
    on_step: Callable[[str], None],
) -> dict[str, Any]:
    on_step("profile")
    profile = profile_decode(loaded.model, prompts, new_tokens=shape.new_tokens, device=loaded.device)
    work = _work(loaded, prompts)
    on_step("roofs")
    roofs = measure_roofs(loaded.device, getattr(torch, compute_dtype.value))
    verdict = judge(
        wall_s=step_wall_s,
        profile=profile,
        work=work,
        roofs=roofs,
        cache_size_bytes=int(torch.cuda.get_device_properties(loaded.device).L2_cache_size),
    )
    on_step("kernels alone")
    return {
        "verdict": None if verdict is None else verdict.value,
        "reason": "the weights fit in the GPU's cache" if verdict is None else None,
        "step_wall_s": step_wall_s,
        "profile": asdict(profile),
        "busy_share": profile.device_busy_s / step_wall_s,
        "work": asdict(work),
        "bytes_per_s": work.bytes / profile.device_busy_s if profile.device_busy_s else None,
        "roofs": asdict(roofs),
        "kernels_alone": asdict(kernels_alone(shape)),
    }


@torch.inference_mode()
def _work(loaded: Loaded, prompts: torch.Tensor) -> StepWork:
    """With the cache as it is after the prefill: decoding adds little to it."""
    cache = getattr(loaded.model(input_ids=prompts, use_cache=True), "past_key_values", None)
    return step_work(loaded.model, cache, batch_size=len(prompts))


def _energy(loaded: Loaded, prompts: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    with nvml_handle(loaded.device) as handle:
        if handle is None:
            return {"reason": "NVML does not show this GPU"}
        try:
            return measure_energy(
                handle,
                prefill=lambda: _generate(loaded, prompts, 1),
                generate=lambda: _generate(loaded, prompts, new_tokens),
                tokens=prompts.numel(),
                decoded=len(prompts) * (new_tokens - 1),
            )
        except NoEnergyCounter as error:
            return {"reason": str(error)}


def _generate(loaded: Loaded, prompts: torch.Tensor, new_tokens: int) -> None:
    model = loaded.model
    with torch.inference_mode(), greedy(model, new_tokens):
        model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=model.generation_config)
    torch.cuda.synchronize(loaded.device)
