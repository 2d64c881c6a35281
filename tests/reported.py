"""Batches as people report them, in a real database: models at several schemes, failures, one GPU or more, or a CPU."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import select

from qbatch.core.domain import BASELINE, DeviceKind, DType, JobSpec, Method, ProtocolOptions, Scheme, SourceRef
from qbatch.core.errors import CudaOom, JobError, SourceCorrupt, Unsupported
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import Measurement
from qbatch.core.retry_policy import RetryLimits
from qbatch.models_db import checkpoints, jobs
from qbatch.models_db.batches import NewJob
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from tests.rows import a_worker, add_batch, claim
from tests.schemes import with_options

H200 = "NVIDIA H200"
EPYC = "AMD EPYC (2 cores)"
PROTOCOL = ProtocolOptions(eval_text_sha256="d95eae75" + "0" * 56, energy=True)
NF4, INT8 = Scheme(method=Method.NF4), Scheme(method=Method.INT8)
NESTED = with_options(NF4, double_quant=True)
SCHEMES = (BASELINE, INT8, NF4)
# Name, billions of parameters, bfloat16's tokens/s, perplexity, NF4's divergence in nats.
MODELS: tuple[tuple[str, float, float, float, float], ...] = (
    ("meta-llama/Llama-3.1-8B", 8.03, 48.8, 6.24, 0.0214),
    ("meta-llama/Llama-3.2-3B", 3.21, 53.1, 7.81, 0.0312),
    ("Qwen/Qwen2.5-7B-Instruct", 7.62, 47.2, 7.46, 0.0277),
    ("mistralai/Mistral-7B-v0.3", 7.25, 51.0, 5.32, 0.0139),
    ("google/gemma-2-9b", 9.24, 38.6, 6.84, 0.0624),
    ("bigscience/bloom-1b7", 1.72, 71.3, 15.4, 0.0461),
    ("/models/phi-3.5-mini-instruct", 3.82, 55.7, 6.10, 0.0188),
    ("HuggingFaceTB/SmolLM2-1.7B", 1.71, 74.0, 8.05, 0.0347),
)
_BYTES_A_PARAMETER = {BASELINE: 2.0, INT8: 1.16, NF4: 0.71, NESTED: 0.66}
_RATE = {BASELINE: 1.0, INT8: 0.28, NF4: 0.74, NESTED: 0.66}
_DIVERGENCE = {INT8: 0.09, NF4: 1.0, NESTED: 1.04}


def _job(model: str, scheme: Scheme, device: DeviceKind) -> NewJob:
    source = SourceRef(name=model, location=model, is_folder=model.startswith("/"))
    spec = JobSpec(source=source, scheme=scheme, dtype=DType.BFLOAT16, device=device, protocol=PROTOCOL)
    return NewJob(spec=spec, bits=scheme.bits(DType.BFLOAT16), predicted_memory_bytes=None)


def a_reported_batch(
    database: Database,
    *,
    models: Iterable[tuple[str, float, float, float, float]] = MODELS,
    schemes: Sequence[Scheme] = SCHEMES,
    device_name: str = H200,
    name: str | None = "nightly",
    failing: bool = False,
) -> int:
    """A batch whose jobs succeed, but for the last model's if ``failing``."""
    kind = DeviceKind.CPU if device_name == EPYC else DeviceKind.CUDA
    models = list(models)
    bundles = [[_job(model, scheme, kind) for scheme in schemes] for model, *_ in models]
    with database.write() as session:
        batch_id = add_batch(session, bundles, name=name)
        ids = list(session.scalars(select(Job.id).where(Job.batch_id == batch_id).order_by(Job.id)))
    worker = a_worker(database, f"worker of {batch_id}", kind=kind, memory_bytes=141 * 2**30, uuid=_uuid(kind))
    tokens = sorted(claim(database, ids, worker))
    for number, token in enumerate(tokens):
        model, scheme = models[number // len(schemes)], schemes[number % len(schemes)]
        if failing and number // len(schemes) == len(models) - 1:
            _fail(database, token, _ERRORS[number % len(_ERRORS)])
        else:
            base = tokens[number - number % len(schemes)][0]
            others = [f"j{base + offset}" for offset in range(len(schemes)) if base + offset != token[0]]
            _succeed(database, token, measurement(model, scheme, device_name, others))
    return batch_id


def _uuid(kind: DeviceKind) -> str | None:
    return "GPU-8a9c0b1e" if kind is DeviceKind.CUDA else None


_ERRORS: tuple[JobError, ...] = (
    Unsupported('the config\'s "<script>alert(1)</script>" is not a model type that transformers knows'),
    SourceCorrupt("model-00002-of-00004.safetensors ends after 1,048,576 bytes; its header says 4,294,967,296"),
    CudaOom("out of memory: 12.4 GiB were needed, 8.1 GiB were free; no current worker has a larger GPU"),
)


def _fail(database: Database, token: jobs.Token, error: JobError) -> None:
    with database.write() as session:
        # Not retried: it failed too often already.
        assert jobs.fail(session, token, error, lease_s=60.0, limits=RetryLimits(backoff_s=0.01, max_failures=1))


def _succeed(database: Database, token: jobs.Token, measured: Measurement) -> None:
    key = measured.details.checkpoint_key
    path = None if key is None else f"checkpoints/{measured.details.task}/{key[:16]}"
    kind = DeviceKind.CPU if measured.device_name == EPYC else DeviceKind.CUDA
    with database.write() as session:
        assert jobs.succeed(session, token, measured, protocol=PROTOCOL.for_device(kind), checkpoint_path=path)
        if key is not None and path is not None:
            checkpoints.record(
                session,
                key=key,
                path=path,
                root_sha256=_sha256("root", key),
                disk_bytes=measured.disk_bytes,
                job_id=token[0],
            )


def measurement(
    model: tuple[str, float, float, float, float], scheme: Scheme, device_name: str, others: Sequence[str] = ()
) -> Measurement:
    name, billions, tokens_per_s, perplexity, divergence = model
    is_baseline, on_cpu = scheme == BASELINE, device_name == EPYC
    parameters = round(billions * 1e9)
    weights = round(parameters * _BYTES_A_PARAMETER[scheme])
    rate = tokens_per_s * _RATE[scheme] / (11.0 if on_cpu else 1.0)
    kl = 0.0 if is_baseline else divergence * _DIVERGENCE[scheme]
    prefill = billions * (0.011 if not on_cpu else 0.31) / (1.0 if is_baseline else 0.81)
    return Measurement(
        device_name=device_name,
        dtype=DType.BFLOAT16,
        compute_dtype=DType.BFLOAT16,
        num_parameters=parameters,
        quantized_fraction=0.0 if is_baseline else 0.87,
        bits_per_param=8 * weights / parameters,
        disk_bytes=weights + 9_100_000,
        memory_footprint_bytes=weights,
        weights_bytes=weights,
        max_allocated_bytes=None if on_cpu else round(weights * 1.08 + 4e8),
        load_model_s=0.4 + billions * 0.18,
        quantize_s=None if is_baseline else 0.3 + billions * 0.31,
        prefill_s_p50=prefill,
        decode_tokens_per_s=rate,
        per_token_s_p50=1 / rate,
        per_token_s_p99=1.09 / rate,
        perplexity=perplexity * math.exp(kl * 0.9),
        kl_mean=None if is_baseline else kl,
        top1_agreement=None if is_baseline else 1 - 1.6 * math.sqrt(kl) / 2.2,
        details=Details.from_json(_details(name, scheme, rate, prefill, kl, on_cpu, weights, others)),
    )


def _details(
    name: str,
    scheme: Scheme,
    rate: float,
    prefill: float,
    kl: float,
    on_cpu: bool,
    weights: int,
    others: Sequence[str],
) -> dict[str, Any]:
    is_baseline = scheme == BASELINE
    shared: dict[str, Any] = {
        "task": "causal-lm",
        "versions": {
            "qbatch": "0.2.0",
            "torch": "2.11.0+cu130",
            "transformers": "5.17.0",
            "bitsandbytes": "0.50.2",
            "python": "3.12.3",
            "driver": None if on_cpu else "580.65.06",
        },
        "shapes": {"batch_size": 1, "prompt_tokens": 256, "new_tokens": 64},
        "rounds": {"count": 3, "interleaved_with": list(others), "phases": _phases(rate, prefill)},
        "memory": {"max_ram": 3_100_000_000, "max_process_vram": None if on_cpu else round(weights * 1.2 + 9e8)},
        "why": None if on_cpu else _why(rate, weights),
        "flags": None if on_cpu else {"throttled": False, "foreign_processes": False},
        "fingerprint": f"sha256:{_sha256('source', name)}",
        "commit": None if name.startswith("/") else _sha256("commit", name)[:40],
        "device_uuid": None if on_cpu else "GPU-8a9c0b1e",
    }
    if is_baseline:
        return shared
    return shared | {
        "checkpoint_key": _sha256(name, scheme.method, str(scheme.own)),
        "quality": _quality(kl),
        "audit": {
            "num_parameters": 8_030_261_248,
            "quantized_parameters": 6_979_321_856,
            "kept": [
                {"name": "model.embed_tokens.weight", "reason": "not a linear layer", "parameters": 525_336_576},
                {"name": "lm_head.weight", "reason": "output layer or tied", "parameters": 525_336_576},
            ],
            "dropped_tensors": ["model.mtp.0.weight"] if "Qwen" in name else [],
            "relative_error_mean": 0.0918 if scheme.method is Method.NF4 else 0.0094,
            "relative_error_worst": [{"name": "model.layers.1.mlp.down_proj.weight", "error": 0.0975}],
            "not_finite": [],
            "shared_pass": 2,
            "writer": "stream",
        },
    }


def _phases(rate: float, prefill: float) -> dict[str, Any]:
    # The host's speed wanders by a percent or two from round to round.
    drift = (1.0, 1.013, 0.991)
    times = {"decode": 63 / rate, "prefill": prefill}
    return {
        phase: {"p50": [seconds * by for by in drift], "mean": [seconds * by for by in drift], "spread": 0.02}
        for phase, seconds in times.items()
    }


def _why(rate: float, weights: int) -> dict[str, Any]:
    busy = weights / 2.3e12
    return {
        "verdict": "host-bound",
        "step_wall_s": 1 / rate,
        "profile": {"steps": 8, "device_busy_s": busy, "launches": 1400, "synchronizations": 1},
        "busy_share": busy * rate,
        "work": {"weight_bytes": weights, "cache_bytes": 2**24, "flops": 1.6e10},
        "bytes_per_s": weights / busy,
        "roofs": {"copy_bytes_per_s": 4.25e12, "matmul_flops_per_s": 7.0e14, "dtype": "bfloat16"},
        "kernels_alone": {"step_s": busy * 1.04, "reason": None},
        "energy": {
            "idle_w": 123.0,
            "prefill": {"gross_j": 9.1, "net_j": 6.2, "uncertainty_j": 0.4, "repetitions": 12, "seconds": 4.0},
            "decode": {
                "gross_j": 9000 / rate,
                "net_j": 4100 / rate,
                "uncertainty_j": 2.1,
                "repetitions": 10,
                "gross_j_per_token": 140 / rate,
                "net_j_per_token": 64 / rate,
            },
            "flags": {"foreign_processes": False},
        },
    }


def _quality(kl: float) -> dict[str, Any]:
    return {
        "windows": 32,
        "rows": 32736,
        "kl_mean": kl,
        "kl_mean_se": kl * 0.03 + 1e-5,
        "kl_median": kl * 0.4,
        "kl_p99": kl * 14,
        "kl_max": kl * 90,
        "top1_agreement": 1 - 1.6 * math.sqrt(kl) / 2.2,
        "top1_agreement_se": 0.0016,
        "ln_ppl_ratio": kl * 0.9,
        "ln_ppl_ratio_se": 0.0011,
        "rms_delta_p": math.sqrt(kl) / 5,
        "against": "hidden",
        "floor": {"kl_mean": 2.4e-5, "top1_agreement": 0.9971, "ln_ppl_ratio": 9e-5},
    }


def _sha256(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()
