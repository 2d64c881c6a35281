"""The explanation of the decoding speed contains only what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.measured_rows import BF16_STEP, INT8_STEP, NF4_STEP, explained, reasons, result, stats
from tests.unit.printed import explain_speed, explain_speed_briefly, results_table

BF16 = explained(1, "none", BF16_STEP)
NF4 = explained(2, "bnb-nf4", NF4_STEP)
INT8 = explained(3, "bnb-int8", INT8_STEP)


def with_step(verdict: str | None, scheme: str = "bnb-nf4", **step: Any) -> dict[str, Any]:
    return explained(4, scheme, reasons(verdict, **({"wall_s": 0.02, "busy_s": 0.019, "launches": 1000} | step)))


def test_nf4_is_slower_because_both_wait_for_the_host() -> None:
    assert explain_speed(NF4, BF16) == [
        "bnb-nf4 decodes at ×0.73 of the baseline (35.5 tok/s against 48.8 tok/s).",
        "Both wait for the host: the device is busy for 24 % of a step, and for 34 % with the baseline; a step "
        "launches 1.9× as many kernels (1,900 against 1,000).",
        "On a host that keeps up, or with CUDA graphs, the kernels of bnb-nf4 alone would take 6.94 ms a step against "
        "the baseline's 7.37 ms: ×1.06 of the rate, so it would be faster there.",
    ]
    assert explain_speed_briefly(NF4, BF16) == (
        "decodes at ×0.73 of its baseline's rate: host-bound (device busy 24 % of a step, 1.9× the launches); its "
        "kernels alone would reach ×1.06 of that rate"
    )


def test_int8_waits_for_its_outlier_path_and_cannot_be_captured() -> None:
    said = " ".join(explain_speed(INT8, BF16))
    assert "bnb-int8 waits for the host 256 times a step: the device is busy for 16 % of it" in said
    assert "LLM.int8's outlier path causes these waits; --int8-threshold 0" in said
    assert "The baseline waits for the host: the device is busy for 34 % of a step." in said
    assert "The kernels of bnb-int8 could not be timed alone: not capturable: operation not permitted when" in said
    assert "they take 12.0 ms of a step against the baseline's 7.00 ms: at best ×0.58 of the rate" in said
    assert "outlier" not in " ".join(explain_speed(INT8 | {"options": {"int8_threshold": 0}}, BF16))
    assert explain_speed_briefly(INT8, BF16) == (
        "decodes at ×0.27 of its baseline's rate: synchronization-bound (device busy 16 % of a step, 2.6× the launches)"
    )


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (
            {"verdict": "memory-bound", "copy_share": 0.73},
            "is memory-bound: a step moves 54.90 GiB at 73 % of the bandwidth of a plain copy.",
        ),
        (
            {"verdict": "compute-bound", "matmul_share": 0.65},
            "is compute-bound: it reaches 65 % of the rate of a large matrix product.",
        ),
        (
            {"verdict": "kernel-bound", "copy_share": 0.19, "matmul_share": 0.012},
            "is limited by its own kernels: the device is busy for 95 % of a step, but reaches only 19 % of the "
            "bandwidth of a plain copy and 1.2 % of the rate of a large matrix product.",
        ),
        (
            {"verdict": None, "reason": "the weights fit in the GPU's cache"},
            "has an unknown bottleneck: the weights fit in the GPU's cache.",
        ),
    ],
)
def test_each_verdict_is_shown_with_its_evidence(step: dict[str, Any], said: str) -> None:
    assert f"bnb-nf4 {said}" in explain_speed(with_step(**step), None)
    assert f"The baseline {said}" in explain_speed(NF4, explained(1, "none", with_step(**step)["details"]["why"]))


def test_kernels_that_read_less_but_take_longer_are_reported() -> None:
    baseline = with_step("memory-bound", scheme="none", busy_s=0.0071, wall_s=0.0075, weight_bytes=15 * 2**30)
    slow = with_step("kernel-bound", busy_s=0.0190, wall_s=0.0195, weight_bytes=5 * 2**30)
    told = "A step reads 5.00 GiB against the baseline's 15.00 GiB, but its kernels do not become faster by it."
    assert told in explain_speed(slow, baseline)
    assert told not in explain_speed(slow, slow | {"scheme": "none"})


@pytest.mark.parametrize(
    ("rate", "alone_s", "said"),
    [
        (40.0, 0.0050, "×1.47 of the rate, so it would be faster there."),
        (40.0, 0.00737, "×1.00 of the rate, so it would be as fast there."),
        (40.0, 0.0147, "×0.50 of the rate, so it would be slower there too."),
        (60.0, 0.0050, "×1.47 of the rate, so it would be faster there too."),
        (60.0, 0.0147, "×0.50 of the rate, so it would be slower there."),
    ],
)
def test_what_a_host_that_keeps_up_would_change(rate: float, alone_s: float, said: str) -> None:
    step = NF4_STEP | {"kernels_alone": {"step_s": alone_s, "reason": None}}
    assert explain_speed(explained(2, "bnb-nf4", step, decode_tokens_per_s=rate), BF16)[-1].endswith(said)


def test_the_host_is_not_blamed_if_the_device_is_busy() -> None:
    fast = with_step("kernel-bound", alone_s=0.018)
    (last,) = explain_speed(fast, with_step("memory-bound", scheme="none", alone_s=0.009, copy_share=0.7))[-1:]
    assert last.startswith(
        "Without the host's delays, as with CUDA graphs, the kernels of bnb-nf4 alone would take 18.0 ms a step"
    )


def test_a_speed_difference_below_its_error_is_ignored() -> None:
    noisy = {"stats": {"decode": stats(1.3, stdev_s=0.4, count=10)}}
    rows = [explained(n, scheme, BF16_STEP, details=noisy) for n, scheme in ((1, "none"), (2, "bnb-nf4"))]
    slower = rows[1] | {"decode_tokens_per_s": 47.0}
    assert explain_speed(slower, rows[0])[0] == (
        "bnb-nf4 decodes at 47.0 tok/s, the baseline at 48.8 tok/s: not distinguishable."
    )
    for alone_s, said in ((0.0050, ", so it would be faster there."), (0.0147, "it would be slower there.")):
        step = BF16_STEP | {"kernels_alone": {"step_s": alone_s, "reason": None}}
        alike = slower | {"details": slower["details"] | {"why": step}}
        assert explain_speed(alike, rows[0])[-1].endswith(said)
    assert "j2 bnb-nf4 decodes at ×0.96≈ of its baseline's rate" in " ".join(
        results_table([rows[0], slower], has_legend=True).split()
    )


def test_without_a_baseline_only_the_row_is_described() -> None:
    said = explain_speed(NF4, None)
    assert said == [
        "bnb-nf4 decodes at 35.5 tok/s.",
        "bnb-nf4 waits for the host: the device is busy for 24 % of a step.",
        "On a host that keeps up, or with CUDA graphs, the kernels of bnb-nf4 alone would take 6.94 ms a step.",
    ]
    assert explain_speed_briefly(NF4, None) is None
    assert explain_speed(BF16, None)[0] == "baseline bfloat16 decodes at 48.8 tok/s."


def test_too_little_gpu_memory_for_profiling_is_reported() -> None:
    row = explained(2, "bnb-nf4", {"verdict": None, "reason": "the GPU has no room left for finding out", "energy": {}})
    row["decode_tokens_per_s"] = 30.0
    assert "bnb-nf4 has an unknown bottleneck: the GPU has no room left for finding out." in explain_speed(row, BF16)
    assert (
        explain_speed_briefly(row, BF16)
        == "decodes at ×0.61 of its baseline's rate: bottleneck unknown (the GPU has no room left for finding out)"
    )


@pytest.mark.parametrize(
    ("layers", "said"), [(14, []), (0, ["All 4-bit layers of bnb-nf4 can use the packed AVX512-BF16 kernel"])]
)
def test_a_cpu_has_no_known_bottleneck_but_its_kernels_are_named(layers: int, said: list[str]) -> None:
    """Where some layers need another kernel, it is a warning, whatever the row's task is (test_kernel_warning.py)."""
    details = {"device_uuid": None, "why": None, "audits": {"cpu_layers_on_generic_kernel": layers}}
    row = result(2, "bnb-nf4", decode_tokens_per_s=3.0, details=details)
    told = explain_speed(row, None)
    assert told[0].startswith("What limits the rate of decoding is measured on GPUs only")
    assert [sentence.partition(",")[0] for sentence in told[1:]] == said
    assert len(explain_speed(row | {"scheme": "bnb-int8", "bits": 8}, None)) == 1


def test_what_was_not_measured_is_not_guessed() -> None:
    assert explain_speed(explained(2, "bnb-nf4", None, decode_tokens_per_s=30.0), BF16) == [
        "The bottleneck of decoding was not measured: it was not asked for (--measure why)."
    ]
    assert explain_speed(result(2, "bnb-nf4", forward_samples_per_s=10.0), None) == []
    unexplained = explained(1, "none", None, decode_tokens_per_s=48.8)
    assert explain_speed(NF4, unexplained)[0].startswith("bnb-nf4 decodes at ×0.73 of the baseline")
    assert "baseline" not in " ".join(explain_speed(NF4, unexplained)[1:])


def test_the_table_of_results_tells_it_in_a_line() -> None:
    table = " ".join(results_table([BF16, NF4, INT8], has_legend=True).split())
    assert (
        "j2 bnb-nf4 decodes at ×0.73 of its baseline's rate: host-bound (device busy 24 % of a step, 1.9× the launches"
        in table
    )
    assert "j3 bnb-int8 decodes at ×0.27 of its baseline's rate: synchronization-bound" in table
    assert "j1 baseline bfloat16 decodes" not in table
    elsewhere = results_table([BF16, NF4 | {"device_name": "NVIDIA A100"}], has_legend=True)
    assert "host-bound" not in elsewhere, "the baseline was not measured there"


def test_the_table_is_followed_by_a_limited_number_of_reasons() -> None:
    rows = [BF16, *(NF4 | {"job_id": f"j{n}"} for n in range(2, 40))]
    table = results_table(rows, has_legend=True)
    assert table.count("host-bound") == 12
    assert "`qbatch show JOB` explains the speed of 26 more." in table
