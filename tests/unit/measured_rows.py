"""Rows of ``find_results`` as an H200 would give them: an 8B model at bfloat16, NF4 and int8."""

from __future__ import annotations

from typing import Any

from qbatch.core.measured.measurement import MEASURED_COLUMNS

NAME = "meta-llama/Meta-Llama-3.1-70B-Instruct"
H200 = "NVIDIA H200"
PROTOCOL: dict[str, Any] = {
    "batch_size": 1,
    "prompt_tokens": 256,
    "new_tokens": 64,
    "warmup_iterations": 2,
    "min_iterations": 5,
    "min_duration_s": 2.0,
    "eval_text_sha256": "d95eae75" + "0" * 56,
    "eval_window": 1024,
    "eval_stride": 1024,
    "eval_max_windows": 32,
}
ROOFS = {"copy_bytes_per_s": 4.25e12, "matmul_flops_per_s": 7.0e14, "dtype": "bfloat16"}


# As bitsandbytes' rows and the baseline's have always stored them.
OPTIONS = {
    "double_quant": False,
    "compute_dtype": "auto",
    "skip_modules": [],
    "int8_threshold": 6.0,
    "quant_storage": "uint8",
    "max_shard_bytes": None,
}


def result(number: int, scheme: str = "none", **fields: Any) -> dict[str, Any]:
    """A row of ``find_results``: j1 is the baseline of all others."""
    options = dict(OPTIONS)
    row: dict[str, Any] = dict.fromkeys(MEASURED_COLUMNS) | {
        "batch_id": "b1",
        "job_id": f"j{number}",
        "model": NAME,
        "revision": None,
        "state": "succeeded",
        "error_kind": None,
        "error_message": None,
        "reused_from": None,
        "scheme": scheme,
        "bits": {"none": 16, "bnb-int8": 8}.get(scheme, 4),
        "double_quant": False,
        "options": options,
        "checkpoint_path": f"checkpoints/{number}",
        "dtype": "bfloat16",
        "compute_dtype": "bfloat16",
        "device_name": H200,
        "num_parameters": 8_030_261_248,
        "quantized_fraction": 0.0 if scheme == "none" else 0.87,
        "baseline_job_id": None if scheme == "none" else "j1",
        "protocol": PROTOCOL,
        "protocol_hash": "p",
        "details": {},
        "disk_bytes": 1000 * 2**20,
    }
    return row | fields


def stats(mean_s: float, stdev_s: float = 0.0, count: int = 100) -> dict[str, Any]:
    percentiles = dict.fromkeys(("p50", "p90", "p95", "p99"), mean_s)
    return {"count": count, "mean": mean_s, "stdev": stdev_s, **percentiles}


def reasons(
    verdict: str | None,
    *,
    wall_s: float,
    busy_s: float,
    launches: float,
    alone_s: float | None = None,
    alone_reason: str | None = None,
    synchronizations: float = 1,
    weight_bytes: int = 15 * 2**30,
    reason: str | None = None,
    copy_share: float | None = None,
    matmul_share: float = 0.01,
) -> dict[str, Any]:
    """``details.why`` of a decode step; ``copy_share`` sets the bytes that the kernels move while they are busy."""
    if copy_share is not None:
        weight_bytes = round(copy_share * ROOFS["copy_bytes_per_s"] * busy_s)  # type: ignore[operator]
    return {
        "verdict": verdict,
        "reason": reason,
        "step_wall_s": wall_s,
        "profile": {
            "steps": 8,
            "device_busy_s": busy_s,
            "launches": launches,
            "synchronizations": synchronizations,
        },
        "busy_share": busy_s / wall_s,
        "work": {
            "weight_bytes": weight_bytes,
            "cache_bytes": 0,
            "flops": matmul_share * 7.0e14 * busy_s,
        },
        "bytes_per_s": weight_bytes / busy_s,
        "roofs": ROOFS,
        "kernels_alone": {"step_s": alone_s, "reason": alone_reason},
    }


def explained(number: int, scheme: str, why: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    """A row that decodes at the rate of its step, with its reasons."""
    rate = {} if why is None or "step_wall_s" not in why else {"decode_tokens_per_s": 1 / why["step_wall_s"]}
    details = {"device_uuid": "GPU-1", "why": why}
    return result(number, scheme, **(rate | fields | {"details": details | fields.get("details", {})}))


BF16_STEP = reasons("host-bound", wall_s=0.0205, busy_s=0.0070, launches=1000, alone_s=0.00737)
NF4_STEP = reasons("host-bound", wall_s=0.0282, busy_s=0.0068, launches=1900, alone_s=0.00694, weight_bytes=5 * 2**30)
INT8_STEP = reasons(
    "synchronization-bound",
    wall_s=0.0763,
    busy_s=0.0120,
    launches=2600,
    synchronizations=256,
    alone_reason="not capturable: operation not permitted when stream is capturing (AcceleratorError)",
)
