"""``compare`` shows only comparable rows side by side, and recommends by what was measured."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from qbatch.views.comparison import Preference
from qbatch.views.groups import models_of
from qbatch.views.missing_parts import missing_part_remarks
from qbatch.views.recommend import Recommendation, recommend
from qbatch.views.unrecommended import unrecommended
from tests.unit.measured_rows import BF16_STEP, NF4_STEP, PROTOCOL, explained, result, stats
from tests.unit.printed import comparison, read, results_table
from tests.unit.test_views import on_terminal

GIB = 2**30


def row(number: int, scheme: str, weights_gib: float, kl: float | None = None, **fields: Any) -> dict[str, Any]:
    quality = {} if kl is None else {"kl_mean_se": kl / 100, "floor": {"kl_mean": 2e-5}, "rows": 32_000}
    details = {"quality": quality, "device_uuid": "GPU-1"} | fields.pop("details", {})
    return result(number, scheme, weights_bytes=round(weights_gib * GIB), kl_mean=kl, details=details, **fields)


BASELINE = row(1, "none", 15.0, decode_tokens_per_s=48.8)
INT8 = row(2, "bnb-int8", 8.5, 0.002, decode_tokens_per_s=13.1)
NF4 = row(3, "bnb-nf4", 5.6, 0.03, decode_tokens_per_s=35.4)
FP4 = row(4, "bnb-fp4", 5.6, 0.09, decode_tokens_per_s=35.5)
ALL = [BASELINE, INT8, NF4, FP4]


def recommended(rows: list[dict[str, Any]], **preference: Any) -> Recommendation:
    (model,) = models_of(read(rows))
    (group,) = model.groups
    return recommend(group, Preference(**preference))


def shipped(rows: list[dict[str, Any]], **preference: Any) -> str | None:
    found = recommended(rows, **preference).ship
    return None if found is None else str(found.job_id)


# what is recommended


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        ({}, "j3"),
        ({"max_kl": 0.01}, "j2"),
        ({"max_kl": 0.001}, "j1"),
        ({"max_kl": 0.2}, "j3"),
        ({"max_weights_bytes": 10 * GIB}, "j3"),
        ({"max_weights_bytes": 5 * GIB}, None),
        ({"max_kl": 0.01, "max_weights_bytes": 8 * GIB}, None),
        ({"prefer": "speed"}, "j1"),
        ({"prefer": "speed", "max_weights_bytes": 10 * GIB}, "j3"),
        ({"prefer": "quality"}, "j2"),
        ({"prefer": "quality", "max_weights_bytes": 6 * GIB}, "j3"),
        ({"prefer": "quality", "max_weights_bytes": 6 * GIB, "max_kl": 0.01}, None),
    ],
)
def test_the_best_of_those_within_the_bounds_is_shipped(preference: dict[str, Any], expected: str | None) -> None:
    assert shipped(ALL, **preference) == expected


def test_the_sentence_says_why_and_how_far_it_holds() -> None:
    assert recommended(ALL).sentence == (
        "Ship bnb-nf4 (j3): the smallest weights (5.60 GiB, ×0.37) with a mean KL of at most 0.05 nats (the default; "
        "--max-kl changes it). Its mean KL is 3.0e-02 ± 3.0e-04 nats. It decodes at ×0.73 of the baseline's rate. It "
        "was measured on NVIDIA H200 at batch 1, over 32,000 positions of one text; other devices, batch sizes and "
        "texts may give other results."
    )


def test_where_nothing_qualifies_each_says_why() -> None:
    found = recommended(ALL, max_kl=0.01, max_weights_bytes=8 * GIB)
    assert found.ship is None
    assert found.sentence.startswith("Nothing qualifies. baseline bfloat16 (j1): its weights, 15.00 GiB, are over 8.00")
    assert "bnb-nf4 (j3): its mean KL, 3.0e-02 nats, is over 0.01." in found.sentence
    assert set(found.rejected) == {"j1", "j2", "j3", "j4"}


def test_the_unquantized_model_is_shipped_with_what_the_others_lack() -> None:
    said = recommended(ALL, max_kl=0.001).sentence
    assert said.startswith("Ship baseline bfloat16 (j1): the smallest weights")
    assert "bnb-int8 (j2) does not qualify: its mean KL, 2.0e-03 nats, is over 0.001" in said


OTHER = row(5, "none", 1.0, model="org/other")
"""Of two models, the reason stands below their lines."""
WIDE = row(6, "none", 30.0, dtype="float32", compute_dtype="float32")


@pytest.mark.parametrize(
    ("rows", "preference", "reason"),
    [
        ([INT8, NF4], {"prefer": "speed"}, "no quantized model is faster beyond the noise "),
        ([INT8 | {"weights_bytes": 16 * GIB}], {}, "no quantized model is smaller "),
        ([INT8, NF4], {"max_kl": 1e-3}, "no quantized model qualifies: j2: its mean KL, 2.0e-03 nats, is over 0.001; "),
        (
            [INT8, FP4],
            {"prefer": "speed"},
            "no quantized model that qualifies is faster beyond the noise; these do not qualify: j4: its mean KL, ",
        ),
        ([WIDE, INT8], {"prefer": "speed", "max_weights_bytes": 20 * GIB}, "no quantized model is faster beyond "),
    ],
    ids=["speed", "size", "none within", "some within", "another baseline"],
)
def test_why_the_baseline_is_shipped_is_true_of_what_was_preferred(
    rows: list[dict[str, Any]], preference: dict[str, Any], reason: str
) -> None:
    said = comparison([BASELINE, *rows, OTHER], Preference(**preference), by="figure", format="table")
    assert f"[1] {reason}" in " ".join(said.split())


def test_of_equal_size_the_nearer_is_shipped_and_ties_are_named() -> None:
    assert shipped([BASELINE, FP4, NF4], max_kl=0.2) == "j3"
    near = FP4 | {"kl_mean": 0.0301}
    found = recommended([BASELINE, NF4, near])
    assert list(found.alike) == ["j4"]
    assert "Its quality is not distinguishable from that of bnb-fp4 (j4)" in found.sentence
    assert "smaller" not in found.sentence


def by_window(row: dict[str, Any], *window_kl: float) -> dict[str, Any]:
    """The row with these sums over windows of 1,000 positions."""
    quality = {"window_kl": list(window_kl), "window_rows": [1000] * len(window_kl)}
    mean = sum(window_kl) / 1000 / len(window_kl)
    details = row["details"] | {"quality": row["details"]["quality"] | quality}
    return row | {"kl_mean": mean, "details": details}


def test_of_equal_size_the_difference_window_by_window_decides() -> None:
    """The error of each row is far larger than the difference, since what is hard for one is hard for the other."""
    nf4 = by_window(NF4, 10.0, 20.0, 30.0, 40.0)
    farther = by_window(FP4, 10.2, 20.3, 30.2, 40.3)
    found = recommended([BASELINE, nf4, farther])
    assert found.ship is not None
    assert (found.ship.job_id, list(found.alike)) == ("j3", [])
    undecided = recommended([BASELINE, nf4, by_window(FP4, 10.9, 19.5, 29.4, 40.4)])
    assert list(undecided.alike) == ["j4"]
    assert "that of bnb-fp4 (j4) (a difference of 5.0e-05 ± 3.6e-04 in mean KL, over the same windows)." in (
        undecided.sentence
    )


def test_of_two_that_are_as_fast_the_smaller_is_shipped() -> None:
    def timed(one: dict[str, Any], stdev_s: float) -> dict[str, Any]:
        return one | {"details": one["details"] | {"stats": {"decode": stats(1.0, stdev_s, count=4)}}}

    faster = INT8 | {"decode_tokens_per_s": 36.0}
    assert shipped([timed(faster, 0.001), timed(NF4, 0.001)], prefer="speed") == "j2"
    found = recommended([timed(faster, 0.05), timed(NF4, 0.05)], prefer="speed")
    assert found.ship is not None
    assert found.ship.job_id == "j3"
    assert "one of the highest rates measured" in found.sentence
    assert "Its speed is not distinguishable from that of bnb-int8 (j2), and its weights are smaller." in found.sentence


@pytest.mark.parametrize(
    ("spreads", "varied"),
    [
        ({"prefill": 0.4, "decode": 0.05, "per_token": 0.04}, "Its prefill time varied much between its rounds"),
        ({"prefill": 0.1, "decode": 0.3, "per_token": 0.4}, "Its decode rate and time for each token varied much"),
        ({"forward": 0.4}, "Its forward time varied much"),
        ({}, "Its speed varied much"),
    ],
    ids=["prefill", "decode", "encoder", "unknown"],
)
def test_what_varied_between_rounds_is_named_by_its_phase(spreads: dict[str, float], varied: str) -> None:
    """It stands beside the decode rate, which may be confirmed where the prefill is not."""
    rounds = {"count": 3, "phases": {phase: {"p50": [1.0], "spread": spread} for phase, spread in spreads.items()}}
    details = NF4["details"] | {"rounds": rounds, "audits": {"spread_between_rounds": 0.4}}
    assert varied in recommended([BASELINE, NF4 | {"details": details}]).sentence


def test_a_quality_loss_within_rounding_counts_as_none() -> None:
    said = recommended([BASELINE, INT8 | {"kl_mean": 1e-5}]).sentence
    assert "Its mean KL is 1.0e-05 ± 2.0e-05 nats, not distinguishable from the baseline." in said


def test_a_margin_below_its_standard_error_is_mentioned() -> None:
    said = recommended([BASELINE, NF4], max_kl=0.0301).sentence
    assert said.startswith("Ship bnb-nf4 (j3)")
    assert "closer to the bound than its standard error" in said
    assert "standard error" not in recommended([BASELINE, NF4], max_kl=0.04).sentence


def on_code(
    row: dict[str, Any], kl: float | None, reason: str | None = None, error: float | None = None
) -> dict[str, Any]:
    quality = {"kl_mean": kl, "kl_mean_se": error, "ln_ppl_ratio": None if kl is None else kl / 2, "reason": reason}
    return row | {"details": row["details"] | {"more_texts": {"code": {"quality": quality}}}}


def test_a_scheme_that_is_fine_on_prose_and_bad_on_code_is_called_that() -> None:
    rows = [BASELINE, on_code(INT8, 0.004), on_code(NF4, 0.3)]
    found = recommended(rows)
    assert found.ship is not None
    assert found.ship.job_id == "j2"
    assert found.rejected["j3"] == ["its mean KL on code, 3.0e-01 nats, is over 0.05"]
    assert "Its mean KL is 2.0e-03 ± 2.0e-05 nats. On code it is 4.0e-03 nats." in found.sentence
    assert "over 32,000 positions of the first text, and on code; other devices" in found.sentence
    assert (
        "bnb-nf4 (j3) is within the bound on the first text only: its mean KL on code, 3.0e-01 nats, is over 0.05."
        in found.sentence
    )


def test_a_bound_on_perplexity_holds_on_every_text() -> None:
    details = NF4["details"] | {"quality": NF4["details"]["quality"] | {"ln_ppl_ratio": 0.01}}
    found = recommended([BASELINE, on_code(NF4 | {"details": details}, 0.3)], max_ppl_ratio=1.1)
    assert found.rejected["j3"] == ["its perplexity ratio to the baseline on code, 1.1618, is over 1.1"]


def test_the_error_on_a_further_text_is_shown() -> None:
    said = recommended([BASELINE, on_code(INT8, 0.004, error=0.0003)]).sentence
    assert "On code it is 4.0e-03 ± 3.0e-04 nats." in said


def test_a_text_that_was_not_compared_does_not_qualify() -> None:
    found = recommended([BASELINE, on_code(NF4, None, "the disk was full")])
    assert found.rejected["j3"] == ["its mean KL on code was not measured (the disk was full)"]


def test_quality_that_was_not_measured_does_not_qualify() -> None:
    unknown = NF4 | {"kl_mean": None, "details": {"quality": {"reason": "another tokenizer"}}}
    found = recommended([BASELINE, INT8, unknown])
    assert found.ship is not None
    assert found.ship.job_id == "j2"
    assert found.rejected["j3"] == ["its mean KL was not measured (another tokenizer)"]
    assert shipped([unknown]) is None
    assert shipped([unknown], prefer="quality") is None


def test_a_measured_quality_decides_although_tasks_failed() -> None:
    """Also of rows that say so of their whole quality, as workers used to."""
    reason = "cannot run the tasks: no question is left"
    failed = {"tasks_reason": reason, "not_measured": {"quality": reason}}
    rows = [BASELINE, INT8 | {"details": INT8["details"] | failed}]
    found = recommended(rows)
    assert found.ship is not None
    assert found.ship.job_id == "j2"
    remarks = [*missing_part_remarks(read(rows))]
    assert remarks == [f"Tasks of j2 were not measured: {reason}."]


@pytest.mark.parametrize("part", ["quality", "perplexity"])
def test_where_no_quality_was_measured_all_is_kept(part: str) -> None:
    unknown = NF4 | {
        "kl_mean": None,
        "perplexity": None,
        "checkpoint_path": "m/nf4",
        "details": {part: {"reason": "it has no tokenizer"}},
    }
    found = recommended([BASELINE, unknown])
    assert found.ship is None
    assert "was not measured, since it has no tokenizer" in found.sentence
    assert unrecommended([read([BASELINE, unknown])], Preference()).paths == ()


@pytest.mark.parametrize(
    "details",
    [
        {"audit": {"not_finite": ["x.weight"]}},
        {"audit": {"int8_infinite_scales": 3}},
        {"audits": {"perplexity_not_finite": True}},
    ],
)
def test_a_broken_checkpoint_is_never_shipped(details: dict[str, Any]) -> None:
    broken = NF4 | {"details": NF4["details"] | details}
    assert shipped([BASELINE, INT8, broken]) == "j2"


def test_predictions_that_are_not_finite_are_never_shipped_or_good() -> None:
    nan = NF4 | {
        "kl_mean": None,
        "details": NF4["details"] | {"quality": {"reason": "its outputs are NaN or infinite"}},
    }
    # What was stored before such outputs were compared with nothing: of NaN the first is the largest, so all agreed.
    older = NF4 | {"kl_mean": None, "top1_agreement": 1.0, "details": {"quality": {}}}
    for broken, said in ((nan, "it cannot be used: its outputs are NaN"), (older, "its KL is not finite")):
        assert shipped([BASELINE, INT8, broken]) == "j2"
        assert shipped([BASELINE, broken], max_kl=10.0) == "j1"
        table = " ".join(results_table([BASELINE, INT8, broken]).split())
        assert said in table
        assert "3 succeeded (1 unfit to use: j3)" in table


def test_perplexity_bounds_by_the_paired_ratio_and_encoders_by_their_ranks() -> None:
    ratio = {"quality": {"ln_ppl_ratio": 0.03, "ln_ppl_ratio_se": 0.001}}
    rows = [BASELINE, row(2, "bnb-nf4", 5.0, details=ratio)]
    assert shipped(rows) == "j1", "1.030 is over the default of 1.02"
    assert shipped(rows, max_ppl_ratio=1.04) == "j2"
    assert "perplexity ratio to the baseline is 1.0305 ± 1.0e-03" in recommended(rows, max_ppl_ratio=1.04).sentence
    encoder = [BASELINE, row(2, "bnb-nf4", 5.0, details={"quality": {"rank_correlation": 0.99}})]
    assert shipped(encoder) == "j2"
    assert shipped([BASELINE, row(2, "bnb-nf4", 5.0, details={"quality": {"rank_correlation": 0.97}})]) == "j1"


# what stands side by side


def test_protocols_and_devices_are_groups_and_say_how_they_differ() -> None:
    longer = {"protocol": PROTOCOL | {"prompt_tokens": 512, "tasks": [{"name": "arc", "sha256": None}]}}
    rows = [
        *ALL,
        row(5, "bnb-nf4", 5.6, 0.02, protocol_hash="q", **longer),
        NF4 | {"job_id": "j6", "device_name": "A100"},
    ]
    (model,) = models_of(read(rows))
    assert [[one.job_id for one in group.rows] for group in model.groups] == [
        ["j1", "j2", "j3", "j4"],
        ["j5"],
        ["j6"],
    ]
    shown = " ".join(comparison(rows, Preference(), by="figure", format="table").split())
    assert "The figures of these 3 groups cannot be compared." in shown
    assert "The groups differ in device (NVIDIA H200, A100), prompt_tokens (256, 512), tasks (none, arc)." in shown
    assert "prompt 512, 64 new tokens; at most 32 windows of 1024 tokens, of text d95eae75, on NVIDIA H200" in shown
    assert "bnb-nf4 (j6): its mean KL, 3.0e-02" not in shown
    assert "groups" not in comparison(ALL, Preference(), by="figure", format="table")


def test_a_baseline_of_another_batch_serves_where_everything_is_the_same() -> None:
    alone = NF4 | {"batch_id": "b2", "job_id": "j9", "baseline_job_id": None}
    shown = comparison([BASELINE, alone], Preference(), by="figure", format="table")
    assert "5.60 GiB ×0.37" in shown
    changed = alone | {"details": alone["details"] | {"fingerprint": "folder:other"}}
    shown = comparison([BASELINE, changed], Preference(), by="figure", format="table")
    assert "×0.37" not in shown
    assert "The groups differ in the model's content." in shown


def test_a_configuration_measured_twice_stands_once_by_its_newer_figures() -> None:
    again = NF4 | {"job_id": "j7", "decode_tokens_per_s": 36.0}
    reused = NF4 | {"job_id": "j8", "reused_from": "j3"}
    (group,) = models_of(read([BASELINE, reused, NF4, again]))[0].groups
    assert [one.job_id for one in group.rows] == ["j1", "j7"]
    assert "j3 is not shown: j7 measured the same later." in comparison(
        [BASELINE, NF4, again], Preference(), by="figure", format="table"
    )
    (group,) = models_of(read([BASELINE, NF4, reused]))[0].groups
    assert dict(group.superseded) == {}, "an answer from an earlier result is not a second measurement"


def test_versions_that_differ_within_a_group_are_said() -> None:
    versions = [{"versions": {"torch": version}} for version in ("2.12", "2.13")]
    rows = [one | {"details": one["details"] | found} for one, found in zip((BASELINE, NF4), versions, strict=True)]
    assert "torch (2.12, 2.13)" in comparison(rows, Preference(), by="figure", format="table")


def test_rows_not_timed_with_their_baseline_are_named() -> None:
    def beside(*others: str) -> dict[str, Any]:
        return NF4 | {"details": NF4["details"] | {"rounds": {"count": 3, "interleaved_with": list(others)}}}

    told = "The rounds of j3 did not alternate with those of j1"
    assert told in comparison([BASELINE, beside("j2")], Preference(), by="figure", format="table")
    assert told not in comparison([BASELINE, beside("j1", "j2")], Preference(), by="figure", format="table")
    assert told not in comparison([BASELINE, NF4], Preference(), by="figure", format="table")


@pytest.mark.parametrize("is_timed", [(True, False), (False, True), (False, False)])
def test_nothing_is_said_of_the_rounds_of_a_row_that_was_not_timed(is_timed: tuple[bool, bool]) -> None:
    rounds = {"rounds": {"count": 3, "interleaved_with": []}}
    rows = [
        one | ({"details": one["details"] | rounds} if timed else {"decode_tokens_per_s": None})
        for one, timed in zip((BASELINE, NF4), is_timed, strict=True)
    ]
    assert "did not alternate" not in comparison(rows, Preference(), by="figure", format="table")


def test_a_warning_is_shown_once_per_row() -> None:
    dropped = {"audit": {"dropped_tensors": ["mtp.weight"]}}
    rows = [BASELINE, *(one | {"details": one["details"] | dropped} for one in (INT8, NF4))]
    shown = " ".join(comparison(rows, Preference(), by="figure", format="table").split())
    assert shown.lower().count("it lacks 1 tensor of the source") == 2, "in the recommendation, and of the other row"
    assert "j2 bnb-int8: it lacks 1 tensor of the source" in shown


def test_rows_without_a_result_are_named() -> None:
    failed = result(5, "bnb-fp4", state="failed", error_kind="cuda_oom", error_message="out of memory")
    shown = comparison([BASELINE, failed], Preference(), by="figure", format="table")
    assert "j5 bnb-fp4 has no result: failed: cuda_oom: out of memory (see `qbatch logs j5`)." in shown
    assert comparison([], Preference(), by="figure", format="table") == "no results"
    only = comparison([failed], Preference(), by="figure", format="table")
    assert "has no result" in only


def test_the_reasons_are_told_in_full_below() -> None:
    rows = [explained(1, "none", BF16_STEP, weights_bytes=15 * GIB)]
    rows += [explained(2, "bnb-nf4", NF4_STEP, weights_bytes=5 * GIB, kl_mean=0.03)]
    shown = " ".join(comparison(rows, Preference(), by="figure", format="table").split())
    assert "Both wait for the host" in shown
    assert "kernels alone 7.37 ms 6.94 ms ×0.94" in shown


def test_tasks_stand_with_their_errors() -> None:
    def scored(one: dict[str, Any], accuracy: float) -> dict[str, Any]:
        task = {"acc": accuracy, "acc_stderr": 0.02, "n_samples": 500, "samples_hash": "s"}
        return one | {"details": one["details"] | {"tasks": {"arc_easy": task}}}

    shown = comparison([scored(BASELINE, 0.8), scored(NF4, 0.79)], Preference(), by="figure", format="table")
    (line,) = (line for line in shown.splitlines() if "arc_easy acc" in line)
    assert line.endswith(" 0.7900 ± 0.0200 ≈")
    assert "0.7000 ± 0.0200\n" in comparison(
        [scored(BASELINE, 0.8), scored(NF4, 0.7)], Preference(), by="figure", format="table"
    )


@pytest.mark.parametrize("by", ["figure", "scheme"])
@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_comparison_fits_the_terminal_and_leaves_nothing_out(
    monkeypatch: pytest.MonkeyPatch, by: str, width: int
) -> None:
    on_terminal(monkeypatch, width)
    shown = comparison(ALL, Preference(), by=by, format="table")
    assert max(map(len, shown.splitlines())) <= width
    for figure in ("5.60 GiB ×0.37", "35.4 tok/s ×0.73", "9.0e-02", "3.0e-04"):
        assert figure in shown


def test_an_encoder_in_the_batch_takes_no_speed_away(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch, 80)
    encoder = [
        row(4, "none", 1.0, model="org/encoder", forward_samples_per_s=20.0),
        row(
            5,
            "bnb-nf4",
            0.5,
            model="org/encoder",
            forward_samples_per_s=18.0,
            baseline_job_id="j4",
            details={"quality": {"rank_correlation": 0.99}},
        ),
    ]
    shown = comparison([BASELINE, INT8, NF4, *encoder], Preference(), by="figure", format="table", in_full=False)
    assert shown.splitlines()[0].split() == ["model", "ship", "weights", "KL/rank", "corr", "decode/throughput"]
    assert "35.4 tok/s" in shown
    assert "18.0 sample/s" in shown


def test_schemes_are_lines_or_columns() -> None:
    by_figure = comparison(ALL, Preference(), by="figure", format="table").splitlines()
    assert any(line.split()[:2] == ["weights", "15.00"] for line in by_figure)
    by_scheme = comparison(ALL, Preference(), by="scheme", format="table").splitlines()
    assert any(line.split()[:2] == ["j3", "bnb-nf4"] for line in by_scheme)


def test_json_and_csv_say_the_same_to_a_program() -> None:
    (model,) = json.loads(comparison(ALL, Preference(), by="figure", format="json"))
    (group,) = model["groups"]
    assert group["recommendation"]["ship"] == "j3"
    assert group["recommendation"]["bounds"] == ["a mean KL of at most 0.05 nats (the default; --max-kl changes it)"]
    assert group["recommendation"]["rejected"] == {"j4": ["its mean KL, 9.0e-02 nats, is over 0.05"]}
    nf4 = next(one for one in group["rows"] if one["job_id"] == "j3")
    assert nf4["ratios"]["weights_bytes"] == pytest.approx(5.6 / 15, rel=1e-6)
    assert nf4["compared_with"] == "j1"
    lines = list(csv.DictReader(io.StringIO(comparison(ALL, Preference(), by="figure", format="csv"))))
    assert [(line["job_id"], line["recommended"]) for line in lines if line["recommended"] == "true"] == [
        ("j3", "true")
    ]
    assert float(lines[2]["weights_bytes_ratio"]) == pytest.approx(5.6 / 15, rel=1e-6)
    assert lines[0]["weights_bytes_ratio"] == ""
    assert comparison([], Preference(), by="figure", format="json") == "[]"


def test_a_program_is_told_what_is_noise_and_which_versions_differ() -> None:
    versions = [{"versions": {"torch": version}} for version in ("2.12", "2.13")]
    noisy = [{"stats": {"decode": stats(1.3, stdev_s=0.4), "per_token": stats(0.02, stdev_s=0.02)}} for _ in versions]
    rows = [
        one | {"per_token_s_p50": at, "details": one["details"] | found | noise}
        for one, found, noise, at in zip((BASELINE, NF4), versions, noisy, (0.0200, 0.0201), strict=True)
    ]
    rows[1] |= {"decode_tokens_per_s": 47.0, "top1_agreement": 0.5}
    ((group,),) = [model["groups"] for model in json.loads(comparison(rows, Preference(), by="figure", format="json"))]
    assert group["versions_differ_in"] == ["torch (2.12, 2.13)"]
    nf4 = next(one for one in group["rows"] if one["job_id"] == "j3")
    assert sorted(nf4["not_distinguishable"]) == ["decode_tokens_per_s", "per_token_s_p50"]
    (_, line) = csv.DictReader(io.StringIO(comparison(rows, Preference(), by="figure", format="csv")))
    assert json.loads(line["not_distinguishable"]) == nf4["not_distinguishable"]


def test_each_row_names_its_baseline_where_there_are_two() -> None:
    wide = row(5, "none", 30.0, dtype="float32", compute_dtype="float32")
    of_wide = row(6, "bnb-nf4", 6.0, 0.01, dtype="float32", compute_dtype="bfloat16", baseline_job_id="j5")
    (group,) = models_of(read([BASELINE, NF4, wide, of_wide]))[0].groups
    assert {job_id: base.job_id for job_id, base in group.baselines.items()} == {"j3": "j1", "j6": "j5"}
    table = comparison([BASELINE, NF4, wide, of_wide], Preference(), by="scheme", format="table")
    assert "j3 bnb-nf4 of j1" in table
    assert "j6 bnb-nf4 in bfloat16 of j5" in table
    assert " of j1" not in comparison(ALL, Preference(), by="scheme", format="table")


def test_a_perplexity_beyond_any_float_is_over_every_bound() -> None:
    broken = NF4 | {"details": NF4["details"] | {"quality": {"ln_ppl_ratio": 1019.0, "ln_ppl_ratio_se": 1.0}}}
    found = recommended([BASELINE, broken], max_ppl_ratio=1.02)
    assert found.rejected["j3"] == ["its perplexity ratio to the baseline, inf, is over 1.02"]
