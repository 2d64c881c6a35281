"""What ``qbatch show`` says of a job: all that is on record, and nothing where nothing is."""

from __future__ import annotations

from typing import Any

import pytest

from qbatch.core.measured.result_row import ResultRow
from qbatch.models_db.job_record import JobRecord, WholeJob
from qbatch.views import job_details
from qbatch.views.scheme import show_scheme, show_scheme_alone
from tests.found import a_search
from tests.unit.measured_rows import BF16_STEP, NF4_STEP, explained, stats
from tests.unit.printed import show_jobs
from tests.unit.test_views import on_terminal

RECORD: dict[str, Any] = {
    "location": "/models/llama",
    "stage": None,
    "attempt": 2,
    "failures": 1,
    "worker": "gpu0@a",
    "progress": None,
    "priority": 0,
    "time_limit_s": None,
    "allow_pickle": False,
    "created_at": "2026-01-02T03:04:05+00:00",
    "started_at": "2026-01-02T03:05:05+00:00",
    "finished_at": "2026-01-02T03:15:05+00:00",
    "not_before": None,
    "checkpoint_key": "c" * 64,
    "checkpoint": {"root_sha256": "5" * 64, "written_by": "j90"},
    "attempts": [
        {
            "attempt": 1,
            "outcome": "worker_lost",
            "worker": "gpu1@b",
            "message": "silent",
            "claimed_at": "2026-01-02T03:05:05+00:00",
            "seconds": 61.0,
        },
        {
            "attempt": 2,
            "outcome": "succeeded",
            "worker": "gpu0@a",
            "message": None,
            "claimed_at": "2026-01-02T03:07:05+00:00",
            "seconds": 480.0,
        },
    ],
}
DETAILS: dict[str, Any] = {
    "fingerprint": "hub:0123",
    "versions": {"torch": "2.13.0", "bitsandbytes": "0.50.2", "cuda": "13.0", "driver": None},
    "size": {"num_parameters": 8_030_261_248, "quantized_parameters": 6_979_321_856, "quant_state_bytes": 436 * 2**20},
    "stats": {
        "prefill": stats(0.0712, 0.001, 28) | {"tokens_per_s": 3595.0},
        "decode": stats(1.776, 0.05, 28),
        "per_token": stats(0.0282, 0.002, 1764),
    },
    "rounds": {
        "count": 3,
        "interleaved_with": ["j1", "j3"],
        "phases": {"decode": {"p50": [1.7, 1.8, 3.1], "mean": [1.7, 1.8, 3.1], "spread": 0.778}},
    },
    "flags": {"foreign_processes": False, "throttled": True},
    "memory": {"max_allocated": 6 * 2**30, "max_reserved": 7 * 2**30, "max_process_vram": None, "max_ram": 3 * 2**30},
    "perplexity": {"tokens": 32_736, "windows": 32, "perplexity_se": 0.0912},
    "quality": {
        "windows": 32,
        "rows": 32_736,
        "kl_mean": 0.031,
        "kl_mean_se": 0.0007,
        "kl_p99": 0.4,
        "kl_p99_se": 0.02,
        "ln_ppl_ratio": 0.0004,
        "ln_ppl_ratio_se": 0.0019,
        "top1_agreement": 0.93,
        "top1_agreement_se": 0.002,
        "against": "hidden",
        "floor": {"kl_mean": 1.2e-5},
    },
    "audit": {
        "kept": [{"name": "lm_head.weight", "reason": "output layer or tied", "parameters": 525_336_576}],
        "dropped_tensors": ["model.mtp.0.weight"],
        "relative_error_mean": 0.0921,
        "relative_error_worst": [{"name": "model.layers.3.mlp.down_proj.weight", "error": 0.1042}],
        "not_finite": [],
        "shared_pass": 2,
        "writer": "stream",
    },
    "audits": {"perplexity_not_finite": False, "gpu_was_throttled": True},
    "tasks": {"arc_easy": {"acc": 0.81, "acc_stderr": 0.008, "n_samples": 2376}},
}
ENERGY = {
    "idle_w": 123.0,
    "decode": {
        "gross_j": 8.1,
        "net_j": 1.2,
        "uncertainty_j": 0.05,
        "gross_j_per_token": 0.13,
        "net_j_per_token": 0.019,
    },
    "flags": {"foreign_processes": True, "throttled": False},
}
BASELINE = explained(1, "none", BF16_STEP)
BASELINE["details"] |= {"fingerprint": DETAILS["fingerprint"]}
NF4 = (
    explained(
        2, "bnb-nf4", NF4_STEP | {"energy": ENERGY}, details=DETAILS, perplexity=7.1, kl_mean=0.031, quantize_s=4.2,
        bits_per_param=5.8, weights_bytes=5_800_000_000, memory_footprint_bytes=5_400_000_000, disk_bytes=5_900_000_000,
    )
    | RECORD
)  # fmt: skip


def said(job: dict[str, Any], baseline: dict[str, Any] | None = None) -> str:
    return " ".join(show_jobs([(job, baseline)]).split())


@pytest.mark.parametrize(
    "fact",
    [
        "j2 bnb-nf4 of meta-llama/Meta-Llama-3.1-70B-Instruct (b1): succeeded",
        "attempts 2, of which 1 counted as failures",
        "1 worker_lost gpu1@b",
        "61.0 s silent",
        "fingerprint hub:0123",
        "double_quant no quant_storage uint8 skip_modules none",
        f"checkpoint key {'c' * 64} checkpoint checkpoints/2 sha256 {'5' * 64} written by j90",
        "hash p shape batch 1, prompt 256, 64 new tokens; at most 32 windows of 1024 tokens, of text d95eae75",
        "torch 2.13.0 bitsandbytes 0.50.2 cuda 13.0",
        "quantized 87.0 % of its parameters (6.98 B of 8.03 B), 436.0 MiB of scales and tables",
        "bits per parameter 5.80",
        "left at bfloat16 lm_head.weight: output layer or tied (525 M)",
        "dropped by transformers 1 tensor: model.mtp.0.weight",
        "worst layers 0.1042 model.layers.3.mlp.down_proj.weight",
        "NaN or infinity in no tensor",
        "streamed, in one pass with 1 other scheme",
        "prefill 28 71.2 ms 1.00 ms",
        "3,595 tok/s",
        "per_token 1764 28.2 ms 2.00 ms 28.2 ms 28.2 ms 28.2 ms 28.2 ms",
        "allocated by torch 6.00 GiB reserved by torch 7.00 GiB host, resident 3.00 GiB",
        "perplexity 7.100 ± 0.091, of 32,736 tokens in 32 windows",
        "mean KL 3.1e-02 ± 7.0e-04 (16-bit rounding alone: 1.2e-05)",
        "ln PPL ratio 4.0e-04 ± 1.9e-03, not distinguishable",
        "top-1 agreement 93.0 % ± 0.2 %",
        "compared with the baseline's hidden states (replayed)",
        "arc_easy acc 0.8100 ± 0.0080, 2376 questions",
        "idle 123 W with the model loaded decode 1.20 ± 0.0500 J net, 8.10 gross; 0.0190 J per token",
        "disturbed while it was measured, other processes used the GPU",
        "rounds 3, alternating with j1, j3 decode 1.70 s, 1.80 s, 3.10 s: medians 77.8 % apart",
        "disturbed while it was measured, the GPU lowered its clocks because of heat or its power limit",
        "gpu was throttled yes",
        "bnb-nf4 decodes at ×0.73 of the baseline",
        "Both wait for the host",
    ],
)
def test_a_measured_job_tells(fact: str) -> None:
    assert fact in said(NF4, BASELINE)


def test_a_baseline_elsewhere_is_not_set_beside_it() -> None:
    assert "×0.73" not in said(NF4, BASELINE | {"device_name": "NVIDIA A100"})
    assert "×0.73" not in said(NF4, BASELINE | {"protocol_hash": "q"})
    other_model = BASELINE | {"details": BASELINE["details"] | {"fingerprint": "sha256:other"}}
    assert "×0.73" not in said(NF4, other_model), "its source changed between the two"


def test_a_defect_of_a_checkpoint_is_shown() -> None:
    audit = DETAILS["audit"] | {"not_finite": ["a.weight"], "writer": "whole", "whole_model_because": "fused experts"}
    text = said(NF4 | {"details": DETAILS | {"audit": audit}})
    assert "defect 1 of its weights contains NaN or infinity: a.weight" in text
    assert "written from the whole model in memory, because fused experts" in text


def test_what_loaders_make_of_a_checkpoint_is_shown() -> None:
    judgement = {
        "verdict": "loads otherwise than measured",
        "version": "vLLM 0.33.0",
        "read_on": "2026-11-28",
        "reasons": ["vLLM quantizes a layer"],
        "advice": ["skip all of it"],
    }
    text = said(NF4 | {"details": DETAILS | {"audit": DETAILS["audit"] | {"loaders": {"vllm": judgement}}}})
    assert "elsewhere vllm loads otherwise than measured (vLLM 0.33.0, 2026-11-28)" in text
    assert "vLLM quantizes a layer" in text
    assert "→ skip all of it" in text


def test_what_was_ignored_and_not_run_is_shown() -> None:
    audit = DETAILS["audit"] | {
        "stale_quantization": "gptq 4 bits, but no tensor is packed",
        "forward": "not tried: why",
    }
    details = DETAILS | {"audit": audit, "noise_inputs": "pixel_values [1, 3, 32, 32]"}
    text = said(NF4 | {"details": details | {"perplexity": {"reason": "it has no tokenizer"}}})
    assert "ignored what the source's config says of a quantization: gptq 4 bits, but no tensor is packed" in text
    assert "before publishing a forward pass: not tried: why" in text
    assert "noise, which no figure that is compared comes from: pixel_values [1, 3, 32, 32]" in text
    assert "no perplexity it has no tokenizer" in text
    assert "before publishing" not in said(
        NF4 | {"details": DETAILS | {"audit": DETAILS["audit"] | {"forward": "ran"}}}
    )


def test_int8_tells_of_its_scales_and_4_bits_do_not() -> None:
    audit = DETAILS["audit"] | {"int8_zero_scales": 2, "int8_infinite_scales": 1}
    int8 = NF4 | {"scheme": "bnb-int8", "bits": 8, "details": DETAILS | {"audit": audit}}
    assert "int8 scales 2 zero (rows of zeros), 1 infinite" in said(int8)
    assert "int8 scales 2" not in said(NF4 | {"details": DETAILS | {"audit": audit}})


def test_a_job_without_a_result_tells_what_there_is() -> None:
    failed = NF4 | {
        "state": "failed", "error_kind": "cuda_oom", "error_message": "no room", "details": None, "protocol": None,
        "checkpoint_path": None, "checkpoint": None, "reused_from": None,
    }  # fmt: skip
    text = said(failed)
    assert "failed: cuda_oom: no room" in text
    assert "speed" not in text
    running = failed | {"state": "running", "stage": "quantizing", "progress": {"bytes_read": 2**30}}
    assert "stage quantizing on gpu0@a, 1.00 GiB read" in said(running)
    assert "result of j7" in said(NF4 | {"reused_from": "j7"})


@pytest.mark.parametrize("width", [80, 100, 160])
def test_it_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    on_terminal(monkeypatch, width)
    lines = show_jobs([(NF4, BASELINE)]).splitlines()
    assert max(map(len, lines)) <= max(width, 94), "a sha256 is not broken"


def test_a_search_is_shown_with_its_mixtures_and_sensitivities() -> None:
    job = {**NF4, "scheme": "bnb-nf4", "state": "queued", "mixture": {"bound": {"max_kl": 0.04}}}
    whole = WholeJob(
        row=ResultRow.from_json(job),
        record=JobRecord.from_json(job),
        baseline=None,
        search=a_search(),
        points={2: "j9"},
    )
    shown = job_details.show_jobs([whole])
    assert "bnb-nf4 auto, KL ≤ 0.04" in shown.splitlines()[0]
    mixtures = shown[shown.index("mixtures, as measured") :].splitlines()
    assert mixtures[5].split() == [
        *("2", "2", "1.2", "KiB", "3.0e-02", "±", "1.0e-03", "███████", "j9", "model.layers.1.a"),
    ]
    layers = shown[shown.index("KL gained by a group") :].splitlines()
    assert [line.split() for line in layers[3:7]] == [
        ["model.layers.0", "█", "2.5e-02"],
        ["model.layers.1", "▄", "1.0e-02"],
        ["model.layers.2", "▂", "~5.0e-03"],
        ["model.layers.3", "▂", "~5.0e-03"],
    ]
    assert whole.to_json()["points"] == {2: "j9"}


def test_a_mixture_is_called_otherwise_where_there_is_no_database() -> None:
    kept = {**NF4, "options": {"skip_modules": ["lm_head", "model.layers.0.mlp.down_proj"]}}
    row = ResultRow.from_json({**kept, "mixture": {"job_id": "j2", "point": 3}})
    assert show_scheme(row) == "bnb-nf4 mixture 3 of j2"
    assert show_scheme_alone(row) == "bnb-nf4 with some layers at 16 bits"
    assert show_scheme_alone(ResultRow.from_json(kept)) == show_scheme(ResultRow.from_json(kept))
