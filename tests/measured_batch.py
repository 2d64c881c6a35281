"""A batch of eight models × two schemes and their baselines in a database, written through the real functions.

As an H200 measures them, with what tables must cope with: noise, a failed job, a model without a tokenizer, a source
of another dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qbatch.core.domain import DeviceKind, DType, Method
from qbatch.core.errors import CudaOom
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import Measurement
from qbatch.models_db import jobs
from qbatch.models_db.batches import NewJob
from qbatch.models_db.session import Database
from qbatch.worker.checkpoints.published import checkpoint_path
from tests.rows import PROTOCOL, a_batch, a_gpu, bundle, claim, fail, spec

H200 = "NVIDIA H200"
NO_TOKENIZER = "the model has no tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRates:
    """A model: its size, and the rates of its baseline. ``file_bytes``: of each parameter in the source's files."""

    name: str
    parameters: int
    decode: float
    file_bytes: int = 2
    has_text: bool = True
    is_unsteady: bool = False


MODELS = (
    ModelRates(name="meta-llama/Meta-Llama-3.1-8B-Instruct", parameters=8_030_261_248, decode=48.8),
    ModelRates(
        name="mistralai/Mistral-Small-24B-Instruct-2501", parameters=23_572_403_200, decode=36.2, is_unsteady=True
    ),
    ModelRates(name="Qwen/Qwen2.5-1.5B-Instruct", parameters=1_543_714_304, decode=54.1),
    ModelRates(name="bigscience/bloom-1b7", parameters=1_722_408_960, decode=61.0, file_bytes=4),
    ModelRates(name="google/gemma-2-2b-it", parameters=2_614_341_888, decode=40.3, is_unsteady=True),
    ModelRates(name="microsoft/Phi-3.5-mini-instruct", parameters=3_821_079_552, decode=45.0),
    ModelRates(name="HuggingFaceTB/SmolLM2-360M-Instruct", parameters=361_821_120, decode=58.2, has_text=False),
    ModelRates(name="deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", parameters=14_770_033_664, decode=39.5),
)
METHODS = (Method.NONE, Method.INT8, Method.NF4)
_WEIGHTS = {Method.NONE: 1.0, Method.INT8: 0.56, Method.NF4: 0.37}
_RATE = {Method.NONE: 1.0, Method.INT8: 0.27, Method.NF4: 0.73}
_STEP_ALONE_S = {Method.NONE: 0.0050, Method.NF4: 0.0048}
_KL = {Method.INT8: 0.002, Method.NF4: 0.03}


def measured_batch(database: Database, *, faster: float = 1.0, kl: float = 1.0) -> int:
    """Store the batch and its results. ``faster``: the factor of its NF4 rows' rates; ``kl``: of their divergences."""
    worker = a_gpu(database, 141, f"{H200} of a batch {faster} {kl}")
    batch_id, ids = a_batch(database, *[_bundle(model) for model in MODELS])
    tokens = sorted(claim(database, ids, worker))
    pairs = [(model, method) for model in MODELS for method in METHODS]
    for token, (model, method) in zip(tokens, pairs, strict=True):
        if (model.name, method) == ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", Method.INT8):
            assert fail(database, token, CudaOom("out of memory: 1.2 GiB asked, 0.3 GiB free"))
            continue
        ratios = {"faster": faster, "kl": kl} if method is Method.NF4 else {}
        _succeed(database, token, model, method, _measurement(model, method, token, **ratios))
    return batch_id


def _bundle(model: ModelRates) -> list[NewJob]:
    return bundle(model.name, *METHODS, device=DeviceKind.CUDA)


def _succeed(
    database: Database, token: jobs.Token, model: ModelRates, method: Method, measurement: Measurement
) -> None:
    key = f"{token[0]:x}".rjust(16, "a")
    path = None if method is Method.NONE else checkpoint_path(model.name, spec(model.name, method).scheme, key)
    with database.write() as session:
        assert jobs.succeed(
            session, token, measurement, protocol=PROTOCOL.for_device(DeviceKind.CUDA), checkpoint_path=path
        )


def _measurement(
    model: ModelRates, method: Method, token: jobs.Token, *, faster: float = 1.0, kl: float = 1.0
) -> Measurement:
    weights = round(model.parameters * 2 * _WEIGHTS[method])
    rate = model.decode * _RATE[method] * faster
    divergence = _KL.get(method) if model.has_text else None
    divergence = None if divergence is None else divergence * kl * (0.4 + MODELS.index(model) % 4 / 2)
    perplexity = 7.2 * (1 + (divergence or 0.0)) if model.has_text else None
    first = token[0] - METHODS.index(method)
    return Measurement(
        device_name=H200,
        dtype=DType.BFLOAT16,
        compute_dtype=DType.BFLOAT16,
        num_parameters=model.parameters,
        quantized_fraction=0.0 if method is Method.NONE else 0.87,
        bits_per_param=16 * _WEIGHTS[method],
        disk_bytes=model.parameters * model.file_bytes if method is Method.NONE else weights + 4096,
        memory_footprint_bytes=weights,
        weights_bytes=weights,
        max_allocated_bytes=round(weights * 1.1),
        load_model_s=2.0,
        quantize_s=None if method is Method.NONE else 4.0,
        prefill_s_p50=0.04 / _RATE[method],
        decode_tokens_per_s=rate,
        per_token_s_p50=1 / rate,
        per_token_s_p99=1.2 / rate,
        perplexity=perplexity,
        kl_mean=divergence,
        top1_agreement=None if divergence is None else 1 - divergence * 1.5,
        details=Details.from_json(_details(model, method, rate, divergence, [f"j{first + n}" for n in range(3)])),
    )


def _details(
    model: ModelRates, method: Method, rate: float, divergence: float | None, others: list[str]
) -> Mapping[str, Any]:
    apart = 0.6 if model.is_unsteady else 0.004
    rounds = [1 / rate * (1 + apart * (n - 1)) for n in range(3)]
    prefill = [0.04 / _RATE[method] * (1 + n / 1000) for n in range(3)]
    phases = {
        "decode": {"p50": rounds, "mean": rounds, "spread": 2 * apart},
        "prefill": {"p50": prefill, "mean": prefill, "spread": 0.0},
    }
    quality: dict[str, Any] = {}
    if divergence is not None:
        quality = {
            "kl_mean": divergence, "kl_mean_se": divergence / 40, "ln_ppl_ratio": divergence / 2,
            "ln_ppl_ratio_se": divergence / 30, "rows": 32_000, "windows": 32, "floor": {"kl_mean": 2e-5},
        }  # fmt: skip
    elif not model.has_text:
        quality = {"reason": NO_TOKENIZER}
    return {
        "task": "causal-lm",
        "device_uuid": "GPU-1",
        "fingerprint": f"sha256:{model.name}",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
        "quality": quality,
        "perplexity": {} if model.has_text else {"reason": NO_TOKENIZER},
        "rounds": {"count": 3, "interleaved_with": others, "phases": phases},
        "audits": {"spread_between_rounds": 2 * apart} if model.is_unsteady else {},
        "why": _why(method, rate),
    }


def _why(method: Method, rate: float) -> Mapping[str, Any]:
    alone = _STEP_ALONE_S.get(method)
    reason = None if alone else "not capturable: operation not permitted when stream is capturing (AcceleratorError)"
    return {
        "verdict": "host-bound",
        "step_wall_s": 1 / rate,
        "busy_share": 0.3,
        "profile": {"steps": 8, "device_busy_s": 0.3 / rate, "launches": 1000.0 / _RATE[method], "synchronizations": 1},
        "kernels_alone": {"step_s": alone, "reason": reason},
    }
