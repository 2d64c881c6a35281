"""What people see: tables that lose nothing, ratios that are fair, progress that fits its stream."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbatch.core.errors import Unsupported
from qbatch.views.formats import Column, render, text_width
from qbatch.views.listings import BATCH_COLUMNS, JOB_COLUMNS, WORKER_COLUMNS, jobs_table, show_progress
from qbatch.views.shared_failures import name_jobs
from qbatch.views.units import (
    show_bytes,
    show_change,
    show_count,
    show_duration,
    show_float,
    show_rate,
    show_ratio,
    show_seconds,
    show_time_left,
)
from tests.unit.measured_rows import NAME, PROTOCOL, result, stats
from tests.unit.printed import results_table


def job(number: int, state: str = "queued", **fields: Any) -> dict[str, Any]:
    return {
        "job_id": f"j{number}",
        "batch_id": "b1",
        "model": NAME,
        "revision": None,
        "scheme": "bnb-nf4",
        "bits": 4,
        "state": state,
        "stage": None,
        "attempt": 0,
        "failures": 0,
        "worker": None,
        "progress": None,
        "error_kind": None,
        "error_message": None,
        "started_at": None,
        "finished_at": None,
    } | fields


BASELINE = result(1, perplexity=10.0, decode_tokens_per_s=50.0, prefill_s_p50=0.04, max_allocated_bytes=2**30)
QUANTIZED = result(
    2,
    "bnb-nf4",
    disk_bytes=290 * 2**20,
    perplexity=10.08,
    decode_tokens_per_s=36.0,
    prefill_s_p50=0.07,
    max_allocated_bytes=2**29,
)


def line_of(table: str, job_id: str) -> str:
    return next(line for line in table.splitlines() if line.removeprefix("✓").split()[:1] == [job_id])


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))


# tables


def test_json_holds_every_key_and_null_for_what_is_not_known() -> None:
    rows = [job(1, progress={"bytes_read": 1}), job(2, model="模型")]
    text = render(rows, JOB_COLUMNS[:1], "json")
    assert json.loads(text) == rows
    assert "模型" in text


def test_json_has_no_infinity() -> None:
    assert json.loads(render([{"perplexity": float("inf"), "details": {"x": [float("nan")]}}], (), "json")) == [
        {"perplexity": None, "details": {"x": [None]}}
    ]


def test_csv_holds_every_key_nested_ones_as_json() -> None:
    rows = [job(1, progress={"bytes_read": 1}, error_message='a "b",\nc'), job(2)]
    first, second = csv.DictReader(io.StringIO(render(rows, JOB_COLUMNS, "csv")))
    assert list(first) == list(rows[0])
    assert json.loads(first["progress"]) == {"bytes_read": 1}
    assert first["error_message"] == 'a "b",\nc'
    assert second["progress"] == ""


def test_no_rows_are_an_empty_list_and_a_header() -> None:
    assert render([], JOB_COLUMNS, "json") == "[]"
    assert render([], BATCH_COLUMNS, "csv").startswith("batch_id,name,")
    assert render([], BATCH_COLUMNS, "table").startswith("batch  name")


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_job_takes_one_line_on_every_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    on_terminal(monkeypatch, width)
    times = {"elapsed_s": 754.0, "left_s": 1500.0, "stage": "benchmarking"}
    rows = [
        job(12345, "running", worker="gpu0@node-a", **times),
        job(12346, "running", model="/data/runs/a-very-long-name/llama-sft-step-12000", **times),
    ]
    lines = jobs_table(rows, of_one_batch=False).splitlines()
    assert len(lines) == 4
    assert ["j12345" in lines[2], "12000" in lines[3]] == [True, True]
    assert all("benchmarking" in line for line in lines[2:])
    if width >= 80:
        assert max(map(len, lines)) <= width
        assert all("~25 min" in line and "12:34" in line for line in lines[2:])


@pytest.mark.parametrize("width", [80, 120])
def test_a_batch_shows_its_times_beside_its_counts(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    on_terminal(monkeypatch, width)
    counts = {"queued": 1800, "running": 3, "succeeded": 30, "failed": 2}
    batch = {"batch_id": "b12", "name": "a-name-that-is-longer-than-most", "jobs": 1835, **counts, "cancelled": 0}
    batch |= {"left_s": 7500.0, "elapsed_s": 12_000.0, "created_at": "2026-01-02T03:04:05+00:00", "priority": 0}
    head, _, line = render([batch], BATCH_COLUMNS, "table").splitlines()
    assert max(len(head), len(line)) <= width
    assert ["cancelled" in head, "priority" in head] == [False, False], "there are none"
    assert "~2.1 h" in line
    assert "3:20:00" in line


def test_a_failure_of_several_jobs_is_said_once_below_them() -> None:
    failed = {"state": "failed", "error_kind": "unsupported", "error_message": "no such layer"}
    begun = failed | {"attempt": 1}
    never = failed | {"error_message": "another"}
    rows = [job(1, **failed), job(2, **begun), job(3, **begun), job(4, **never), job(5, "queued")]
    *_, first, second = jobs_table(rows, of_one_batch=True).splitlines()
    assert first == "j1, j2, j3: unsupported: no such layer (see `qbatch logs j2`)", "no worker has begun the first"
    assert second == "j4: unsupported: another"
    assert name_jobs([f"j{number}" for number in range(100)]) == "j0, j1, j2, j3, j4, j5 and 94 more"


def test_a_pipe_gets_the_whole_width_on_one_line() -> None:
    message = "word " * 100
    table = jobs_table([job(1, "failed", error_kind="fetch_error", error_message=message)], of_one_batch=False)
    assert len(table.splitlines()) == 5
    assert message.strip() in table.splitlines()[-1]
    assert "\x1b" not in table


def test_numbers_stand_right_and_what_is_not_known_is_a_dash() -> None:
    columns = (Column(key="n", title="number"), Column(key="x", title="x"))
    assert render([{"n": 5, "x": None}, {"n": 1000, "x": "a"}], columns, "table").splitlines() == [
        "number  x",
        "──────  ─",
        "     5  –",
        "  1000  a",
    ]


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_table_has_one_line_per_row_without_control_characters(texts: list[str]) -> None:
    table = render([{"text": text} for text in texts], (Column(key="text", title="text", wraps=True),), "table")
    lines = table.split("\n")
    assert len(lines) == len(texts) + 2
    assert all(line.isprintable() for line in lines)


_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


@given(st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_csv_and_json_escape_control_characters(text: str) -> None:
    row = {"text": text, "nested": {"name": text}, "list": [text]}
    for format_ in ("csv", "json"):
        assert not _STEERING.search(render([row], (), format_)), format_
    assert json.loads(render([row], (), "json")) == [row]
    _, (_, nested, listed) = csv.reader(io.StringIO(render([row], (), "csv"), newline=""))
    assert (json.loads(nested), json.loads(listed)) == ({"name": text}, [text])


def test_an_escape_sequence_is_shown_as_one() -> None:
    csv_ = render([{"message": "\x1b]0;title\x07 \x9b31m \u202e über\nnext"}], (), "csv")
    assert csv_ == 'message\n"\\x1b]0;title\\x07 \\x9b31m \\u202e über\nnext"'
    assert str(Unsupported("no \x1b[31marchitecture\n")) == "no \\x1b[31marchitecture\\n"


def test_wide_characters_take_two_columns() -> None:
    assert text_width("模型a") == 5
    rows = [{"a": "模型", "b": 1}, {"a": "abcd", "b": 2}]
    lines = render(rows, (Column(key="a", title="a"), Column(key="b", title="b")), "table").splitlines()
    assert lines[2:] == ["模型  1", "abcd  2"]


def test_on_a_narrow_terminal_the_time_stays_longer_than_the_priority() -> None:
    shown = [column.key for column in BATCH_COLUMNS if column.spare]
    assert shown.index("elapsed_s") < shown.index("priority")


def test_the_unquantized_model_is_called_the_baseline() -> None:
    rows = [{"job_id": "j1", "scheme": "none"}, {"job_id": "j2", "scheme": "bnb-nf4"}]
    lines = render(rows, JOB_COLUMNS, "table").splitlines()
    assert ["baseline" in line for line in lines[2:]] == [True, False]
    assert '"none"' in render(rows, JOB_COLUMNS, "json")


def test_every_listing_shows_its_rows() -> None:
    batch = {"batch_id": "b7", "name": "night", "jobs": 3, "created_at": "2026-01-02T03:04:05+00:00"}
    assert "night" in render([batch], BATCH_COLUMNS, "table")
    worker = {"worker": "gpu0@a", "device_name": "NVIDIA H200", "memory_bytes": 150 * 2**30, "jobs": ["j1", "j2"]}
    table = render([worker], WORKER_COLUMNS, "table")
    assert "150.00 GiB" in table
    assert "j1, j2" in table


def test_no_view_imports_what_is_slow_to_import() -> None:
    """The figures that people wait for come from a start-up of a tenth of a second."""
    program = (
        "import sys\n"
        "from qbatch.core import inspection\n"
        "from qbatch.models_db import health, job_record\n"
        "from qbatch.views import compare, doctor, job_details, listings, live, model_description, results_table\n"
        "print(sorted({'rich', 'torch', 'transformers', 'celery', 'huggingface_hub', 'redis'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# units


def test_figures_keep_their_digits() -> None:
    assert [show_float(x) for x in (0.0, 7.2731, 12345.6, 0.00031)] == ["0", "7.273", "12,346", "0.0003100"]
    assert [show_float(x) for x in (float("inf"), float("nan"))] == ["inf", "nan"]
    assert [show_seconds(x) for x in (0.00031, 0.31, 0.9999, 163.2)] == ["0.310 ms", "310 ms", "1.00 s", "163 s"]
    assert [show_bytes(x) for x in (1024, 5 * 2**20, 3 * 2**29)] == ["1.0 KiB", "5.0 MiB", "1.50 GiB"]
    assert [show_count(x) for x in (999, 426_624, 1_722_408_960)] == ["999", "427 k", "1.72 B"]
    assert show_rate(35.42, "tok") == "35.4 tok/s"
    assert (show_ratio(0.29), show_ratio(0.034), show_change(1.008)) == ("×0.29", "×0.034", "+0.8 %")


@given(st.floats(min_value=1e-9, max_value=1e14))
def test_a_shown_float_is_the_float_to_four_figures(value: float) -> None:
    assert float(show_float(value).replace(",", "")) == pytest.approx(value, rel=5.1e-4)


# results


def test_each_figure_stands_beside_its_ratio_to_the_baseline() -> None:
    table = results_table([QUANTIZED, BASELINE])
    row = line_of(table, "j2")
    for shown in ("290.0 MiB ×0.29", "36.0 tok/s ×0.72", "70.0 ms ×1.75", "10.08 +0.8 %", "512.0 MiB ×0.50"):
        assert shown in row
    assert "×" not in line_of(table, "j1")
    assert table.index("j1 baseline bfloat16") < table.index("j2 bnb-nf4")
    assert f"{NAME} · 8.03 B parameters" in table
    assert "NVIDIA H200" in table


def test_an_encoder_has_forward_figures_and_no_others() -> None:
    rows = [
        result(1, forward_s_p50=0.004, forward_samples_per_s=250.0),
        result(2, "bnb-int8", bits=8, forward_s_p50=0.006, forward_samples_per_s=160.0),
    ]
    table = results_table(rows)
    assert "forward" in table.splitlines()[0]
    for absent in ("prefill", "decode", "perplexity"):
        assert absent not in table.splitlines()[0]
    assert "6.00 ms ×1.50" in table
    assert "160 sample/s ×0.64" in table


def test_a_failed_row_says_why_and_an_unfinished_one_where_it_stands() -> None:
    table = results_table(
        [
            result(1),
            result(
                2, "bnb-nf4", state="failed", error_kind="cuda_oom", error_message="out of\nmemory", disk_bytes=None
            ),
            result(3, "bnb-fp4", state="queued", disk_bytes=None),
        ]
    )
    assert line_of(table, "j2").endswith("failed: cuda_oom: out of memory (see `qbatch logs j2`)")
    assert line_of(table, "j3").endswith("queued")


@pytest.mark.parametrize(
    ("baseline", "quantized", "said"),
    [
        ({}, {"protocol_hash": "q"}, "another protocol"),
        ({}, {"details": {"fingerprint": "sha256:other"}}, "the model's files changed"),
        ({"state": "failed"}, {}, "its baseline has no result"),
    ],
)
def test_no_ratio_is_given_where_there_is_nothing_to_compare(
    baseline: dict[str, Any], quantized: dict[str, Any], said: str
) -> None:
    table = results_table([BASELINE | baseline, QUANTIZED | quantized])
    assert "[1]" in line_of(table, "j2")
    assert said in table
    if not baseline:
        assert "×" not in line_of(table, "j2")


def test_a_baseline_that_is_not_shown_is_a_footnote() -> None:
    table = results_table([QUANTIZED])
    assert "×" not in line_of(table, "j2")
    assert "not among the rows shown" in table


def test_speed_is_not_compared_across_devices_but_size_is() -> None:
    row = line_of(results_table([BASELINE, QUANTIZED | {"device_name": "NVIDIA A100"}]), "j2")
    assert "290.0 MiB ×0.29" in row
    assert "+0.8 %" in row
    assert row.count("×") == 1


def test_a_mostly_unquantized_model_has_a_footnote() -> None:
    table = results_table([BASELINE, QUANTIZED | {"quantized_fraction": 0.098}])
    assert "[1]" in line_of(table, "j2")
    assert "only 9.8 % of its parameters are stored in 4 bits" in table
    assert "only" not in results_table([BASELINE, QUANTIZED])


@pytest.mark.parametrize(
    ("details", "said"),
    [
        (
            {"audit": {"not_finite": ["a.weight", "b.weight"]}},
            "2 of its weights contain NaN or infinity: a.weight, b.weight",
        ),
        ({"audit": {"int8_infinite_scales": 1}}, "1 of its int8 scales is infinite: rows with values over 65504"),
        (
            {"audit": {"dropped_tensors": [f"mtp.{n}.weight" for n in range(5)]}},
            "it lacks 5 tensors of the source, which transformers drops: mtp.0.weight, mtp.1.weight, "
            "mtp.2.weight and 2 more",
        ),
        (
            {"audit": {"idle_skip_modules": ["self_attn"]}},
            "--skip-modules names layers that it does not have: self_attn",
        ),
        ({"audits": {"perplexity_not_finite": True}}, "its perplexity is not finite"),
        (
            {"flags": {"throttled": True, "clocks_changed": False}},
            "the GPU lowered its clocks because of heat or its power limit",
        ),
    ],
)
def test_a_defect_of_a_checkpoint_is_a_footnote(details: dict[str, Any], said: str) -> None:
    table = results_table([BASELINE, QUANTIZED | {"details": details}])
    assert "[1]" in line_of(table, "j2")
    assert said in " ".join(table.split())
    clean = {"audit": {"not_finite": [], "int8_infinite_scales": 0, "dropped_tensors": []}}
    assert "[1]" not in results_table([BASELINE, QUANTIZED | {"details": clean}])


def test_a_difference_that_is_noise_is_marked() -> None:
    quality = {"kl_mean_se": 1e-6, "ln_ppl_ratio": 0.008, "ln_ppl_ratio_se": 0.009, "floor": {"kl_mean": 2e-5}}
    row = QUANTIZED | {"kl_mean": 3e-5, "details": {"quality": quality}}
    line = line_of(results_table([BASELINE, row]), "j2")
    assert "10.08 +0.8 %≈" in line
    assert "3.0e-05" in line
    assert "3.0e-05 ≈" not in line
    assert "≈ within noise" in results_table([BASELINE, row])
    assert "≈ means not distinguishable" in results_table([BASELINE, row], has_legend=True)
    rounding = results_table([BASELINE, row | {"kl_mean": 1.9e-5}])
    assert "1.9e-05 ≈" in line_of(rounding, "j2")
    assert "≈" not in results_table([BASELINE, QUANTIZED])


def test_speed_is_noise_only_where_its_error_says_so() -> None:
    def timed(row: dict[str, Any], stdev_s: float) -> dict[str, Any]:
        return row | {"details": {"stats": {"decode": stats(1.0, stdev_s, count=9)}}}

    near = QUANTIZED | {"decode_tokens_per_s": 49.0}
    assert "×0.98≈" in line_of(results_table([timed(BASELINE, 0.06), timed(near, 0.06)]), "j2")
    assert "×0.98≈" not in line_of(results_table([timed(BASELINE, 0.01), timed(near, 0.01)]), "j2")


def test_rounds_that_lie_apart_are_fewer_measurements_than_they_look() -> None:
    def timed(row: dict[str, Any], *means: float) -> dict[str, Any]:
        phases = {"decode": {"p50": list(means), "mean": list(means), "spread": 0.5}}
        details = {"stats": {"decode": stats(1.0, 0.01, count=900)}, "rounds": {"count": 3, "phases": phases}}
        return row | {"details": details}

    near = QUANTIZED | {"decode_tokens_per_s": 48.0}
    apart = results_table([timed(BASELINE, 0.8, 1.0, 1.2), timed(near, 1.0, 1.0, 1.0)])
    assert "×0.96≈" in line_of(apart, "j2")
    together = results_table([timed(BASELINE, 1.0, 1.0, 1.0), timed(near, 1.0, 1.0, 1.0)])
    assert "×0.96≈" not in line_of(together, "j2")


def test_rows_of_other_protocols_and_devices_have_their_own_headings() -> None:
    longer = {"protocol": PROTOCOL | {"prompt_tokens": 512}, "protocol_hash": "q"}
    failed = result(5, "bnb-fp4", state="failed", error_kind="cuda_oom", protocol=None, protocol_hash=None)
    rows = [BASELINE, result(3, **longer), QUANTIZED, result(4, "bnb-nf4", baseline_job_id="j3", **longer), failed]
    lines = results_table(rows).splitlines()
    order = [line.removeprefix("✓").split()[0] for line in lines if re.match("[ ✓] j[1-5] ", line)]
    assert order == ["j1", "j2", "j3", "j4", "j5"]
    assert "  batch 1, prompt 256, 64 new tokens; at most 32 windows of 1024 tokens, of text d95eae75, on" in lines[2]
    assert "prompt 512" in lines[5]
    assert lines[8] == "  not measured"
    legend = results_table([BASELINE, QUANTIZED], has_legend=True)
    assert legend.count("prompt 256") == 1, "once, below the table"


def test_a_heading_names_what_two_protocols_of_one_shape_differ_in() -> None:
    tasks = [{"name": "arc_easy", "sha256": None}]
    other = {"protocol": PROTOCOL | {"min_iterations": 9, "tasks": tasks}, "protocol_hash": "q"}
    table = results_table(
        [BASELINE, QUANTIZED, result(3, **other), result(4, "bnb-nf4", baseline_job_id="j3", **other)]
    )
    headings = [line for line in table.splitlines() if "batch 1" in line]
    assert [line.split("d95eae75, ")[1] for line in headings] == [
        f"min_iterations 5, tasks none, on {BASELINE['device_name']}",
        f"min_iterations 9, tasks arc_easy, on {BASELINE['device_name']}",
    ]


def test_rows_of_one_protocol_at_other_shapes_are_told_apart_below() -> None:
    shapes = {"batch_size": 1, "prompt_tokens": 16, "new_tokens": 64, "eval_window": 32, "eval_stride": 32}
    clipped = [result(n, details={"shapes": shapes}, model=f"org/small-{n}") for n in range(3, 8)]
    table = " ".join(results_table([BASELINE, QUANTIZED, *clipped], has_legend=True).split())
    assert "All were measured" not in table
    assert (
        "j1, j2 were measured with batch 1, prompt 256, 64 new tokens; at most 32 windows of 1024 tokens, of text"
        in table
    )
    assert (
        "j3, j4, j5 and 2 more were measured with batch 1, prompt 16 (256 requested), 64 new tokens; at most 32 "
        "windows of 32 (1024 requested) tokens, of text"
    ) in table
    alone = results_table([BASELINE, QUANTIZED], has_legend=True)
    assert "All were measured with batch 1, prompt 256" in " ".join(alone.split())


def test_disturbances_of_the_energy_measurement_are_footnotes() -> None:
    energy = {"flags": {"foreign_processes": False, "throttled": True}}
    table = results_table([BASELINE, QUANTIZED | {"details": {"why": {"energy": energy}}}])
    assert "while its energy was measured, the GPU lowered its clocks" in " ".join(table.split())


def test_a_row_not_timed_with_its_baseline_has_a_footnote() -> None:
    def visit(row: dict[str, Any], torch: str, *others: str) -> dict[str, Any]:
        return row | {"details": {"rounds": {"count": 3, "interleaved_with": others}, "versions": {"torch": torch}}}

    together = results_table([visit(BASELINE, "2.12", "j2"), visit(QUANTIZED, "2.12", "j1")])
    assert "did not alternate" not in together
    assert "other versions" not in together
    apart = results_table([visit(BASELINE, "2.12"), visit(QUANTIZED, "2.13", "j3")])
    assert "[1][2]" in line_of(apart, "j2")
    assert "its rounds did not alternate with its baseline's" in " ".join(apart.split())
    assert "its baseline was measured with other versions: torch (2.12, 2.13)" in " ".join(apart.split())
    retried = results_table([visit(BASELINE, "2.12"), visit(QUANTIZED, "2.12", "j1")])
    assert "did not alternate" in retried, "its baseline was timed again by itself"
    of_its_method = visit(QUANTIZED, "2.12", "j1")
    of_its_method["details"]["versions"]["torchao"] = "0.18"
    assert "other versions" not in results_table([visit(BASELINE, "2.12", "j2"), of_its_method])
    reused = results_table([visit(BASELINE, "2.12", "j2") | {"reused_from": "j90"}, visit(QUANTIZED, "2.12", "j90")])
    assert "did not alternate" not in reused


@pytest.mark.parametrize("other", [{"batch_id": "b2"}, {"model": "/models/other"}], ids=["batch", "model"])
def test_the_protocol_is_said_where_any_other_row_of_the_table_has_another(other: dict[str, Any]) -> None:
    longer = {"protocol": PROTOCOL | {"prompt_tokens": 512}, "protocol_hash": "q"}
    table = results_table([BASELINE, QUANTIZED, result(3, **other, **longer)])
    assert [line.split(", ")[1] for line in table.splitlines() if "batch 1" in line] == ["prompt 256", "prompt 512"]
    same = results_table([BASELINE, QUANTIZED, result(3, **other)], has_legend=True)
    assert same.count("batch 1") == 1, "once, below the table"


def test_an_encoder_shows_how_well_its_similarities_hold() -> None:
    rows = [result(1), result(2, "bnb-nf4", details={"quality": {"rank_correlation": 0.9871}})]
    table = results_table(rows)
    assert "rank corr" in table.splitlines()[0]
    assert "0.9871" in line_of(table, "j2")
    assert "≈" not in table
    quality = {"rank_correlation": 0.9997, "floor": {"rank_correlation": 0.9995}}
    assert "0.9997 ≈" in line_of(results_table([result(1), result(2, "bnb-nf4", details={"quality": quality})]), "j2")


def test_schemes_that_differ_in_an_option_can_be_told_apart() -> None:
    options = result(2)["options"]
    rows = [
        result(1),
        result(2, "bnb-int8", options=options | {"int8_threshold": 0.0}),
        result(3, "bnb-int8"),
        result(4, "bnb-nf4", options=options | {"skip_modules": ["q_proj"], "quant_storage": "bfloat16"}),
    ]
    table = results_table(rows)
    assert "j2 bnb-int8 threshold 0 " in table
    assert "j3 bnb-int8  " in table
    assert "j4 bnb-nf4 without q_proj stored as bfloat16 " in table


def test_a_reused_row_is_marked() -> None:
    table = results_table([BASELINE | {"reused_from": "j90"}, QUANTIZED])
    assert "[1]" in line_of(table, "j1")
    assert "[1]" not in line_of(table, "j2")
    assert "not measured again" in table


def test_what_holds_for_all_rows_is_said_once_and_marks_none() -> None:
    table = results_table([BASELINE | {"reused_from": "j90"}, QUANTIZED | {"reused_from": "j91"}])
    assert "[1]" not in table
    assert table.count("not measured again") == 1
    assert "All: taken from an earlier job's" in table


def test_a_speed_that_varied_is_marked_at_the_cell() -> None:
    rounds = {"phases": {"decode": {"p50": [1.0, 2.0], "spread": 0.67}, "prefill": {"p50": [1.0, 1.0], "spread": 0.0}}}
    varied = QUANTIZED | {"details": {"audits": {"spread_between_rounds": 0.67}, "rounds": rounds}}
    table = results_table([BASELINE, varied])
    assert "36.0 tok/s ×0.72?" in line_of(table, "j2")
    assert "70.0 ms ×1.75?" not in line_of(table, "j2"), "the prefill did not"
    assert "[1]" not in table
    assert "? uncertain" in table
    assert "? means that a speed is uncertain: it differed much" in " ".join(
        results_table([varied], has_legend=True).split()
    )


def test_a_large_unconfirmed_difference_is_not_called_about_equal() -> None:
    """On a busy host ×1.80 may be chance, and it is no sign that the two are alike either."""
    unsteady = {"details": {"stats": {"decode": stats(1.0, 0.9, count=9)}}}
    for rate, shown in ((90.0, "90.0 tok/s ×1.80?"), (54.0, "54.0 tok/s ×1.08≈"), (10.0, "10.0 tok/s ×0.20 ")):
        row = QUANTIZED | unsteady | {"decode_tokens_per_s": rate}
        assert shown in line_of(results_table([BASELINE | unsteady, row]), "j2")


def test_a_ratio_of_files_of_unlike_dtypes_is_marked() -> None:
    sized = {"weights_bytes": 500 * 2**20}
    rows = [BASELINE | sized, QUANTIZED | {"weights_bytes": 280 * 2**20}]
    assert "290.0 MiB ×0.29†" in line_of(results_table(rows), "j2")
    assert "280.0 MiB ×0.56 " in line_of(results_table(rows), "j2"), "in memory both are of one dtype"
    assert "† source of another dtype" in results_table(rows)
    same = [BASELINE | {"weights_bytes": 990 * 2**20}, rows[1]]
    assert "†" not in results_table(same)


def test_a_hidden_baseline_is_still_compared_with_and_chosen_beside() -> None:
    quality = {"details": {"quality": {"kl_mean": 0.01, "kl_mean_se": 0.001}}, "kl_mean": 0.01}
    table = results_table([QUANTIZED | quality | {"weights_bytes": 2**28}], [BASELINE | {"weights_bytes": 2**30}])
    assert "36.0 tok/s ×0.72" in line_of(table, "j2")
    assert line_of(table, "j2").startswith("✓")
    assert "j1" not in table
    assert "no ratios" not in table
    assert " ".join(table.split()).endswith(
        "1 job of 1 model on NVIDIA H200: 1 succeeded. Ship bnb-nf4 of 1 model: weights from 1.00 GiB to 256.0 MiB "
        "(×0.25)."
    )


def test_quality_that_is_missing_has_a_reason_below_the_table() -> None:
    blind = {"details": {"perplexity": {"reason": "it has no tokenizer"}, "quality": {"reason": "nothing to compare"}}}
    rows = [result(1, **blind), result(2, "bnb-nf4", **blind)]
    assert "Quality was not measured: it has no tokenizer." in results_table(rows)
    compared = QUANTIZED | {"details": {"quality": {"reason": "the baseline's outputs are not stored"}}}
    table = results_table([BASELINE, compared])
    assert "Comparison with the baseline of j2 was not measured: the baseline's outputs are not stored." in table


def test_tasks_that_failed_are_missing_alone() -> None:
    reason = "cannot run the tasks: no question is left"
    rows = [BASELINE | {"details": {"tasks_reason": reason}}, QUANTIZED]
    assert f"Tasks of j1 were not measured: {reason}." in results_table(rows)


def test_sorted_rows_are_one_ranked_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [QUANTIZED | {"model": "org/b", "batch_id": "b2", "prefill_s_p50": 0.03, "kl_mean": 0.1}, BASELINE]
    lines = results_table(rows, sort="prefill_s_p50").splitlines()
    assert [line.removeprefix("✓").split()[:3] for line in lines[1:3]] == [
        ["1", "j2", "b"],
        ["2", "j1", NAME.rpartition("/")[2]],
    ]
    on_terminal(monkeypatch, 80)
    narrow = results_table(rows, sort="prefill_s_p50").splitlines()
    assert narrow[0].split() == ["prefill", "decode", "KL"]
    assert max(map(len, narrow)) <= 80


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_results_fit_the_terminal_and_say_what_they_leave_out(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    on_terminal(monkeypatch, width)
    failed = result(3, "bnb-int8", state="failed", error_kind="host_oom", error_message="the kernel killed it " * 9)
    table = results_table([BASELINE, QUANTIZED, failed])
    assert max(map(len, table.splitlines())) <= width
    assert ("--wide" in table) == (width < 120)
    wide = results_table([BASELINE, QUANTIZED, failed], is_wide=True)
    assert "70.0 ms ×1.75" in line_of(wide, "j2")


def shown_titles(width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    on_terminal(monkeypatch, width)
    figures = {
        "weights_bytes": 2**33,
        "decode_tokens_per_s": 99.0,
        "prefill_s_p50": 0.01,
        "perplexity": 7.0,
        "max_allocated_bytes": 2**33,
        "bits_per_param": 5.9,
        "quantize_s": 4.0,
        "load_model_s": 2.0,
    }
    rows = [result(1, **figures), result(2, "bnb-nf4", kl_mean=0.01, top1_agreement=0.9, **figures)]
    return re.split(" {2,}", results_table(rows).splitlines()[0].strip())


def test_columns_leave_in_their_order_and_the_answer_never(monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = ["load", "quantize", "bits/param", "disk", "peak memory", "prefill", "perplexity"]
    every = shown_titles(500, monkeypatch)
    assert every == ["weights", "decode", "KL", "top-1", *reversed(leaving)]
    for width in range(200, 79, -1):
        titles = shown_titles(width, monkeypatch)
        assert titles == every[: len(titles)]
    assert titles == ["weights", "decode", "KL", "top-1"], "80 columns hold these"
    assert shown_titles(50, monkeypatch) == ["weights", "KL"]


def test_chosen_columns_are_shown_in_their_order() -> None:
    lines = results_table([BASELINE, QUANTIZED], columns=("perplexity", "disk", "checkpoint_path")).splitlines()
    assert lines[0].split() == ["perplexity", "disk", "checkpoint", "path"]
    assert "checkpoints/2" in line_of("\n".join(lines), "j2")


def test_an_empty_result_list_says_so() -> None:
    assert results_table([]) == "no results"
    assert results_table([result(1, state="queued", disk_bytes=None)]).startswith(NAME)


def test_progress_shows_what_is_known() -> None:
    assert show_progress({"bytes_read": 2**20, "bytes_written": 0, "bytes_total": None}) == "1.0 MiB read"
    assert show_progress({"bytes_read": 2**20, "bytes_written": 0, "bytes_total": 2**22}) == "1.0 MiB of 4.0 MiB read"
    both = {"bytes_read": 2**20, "bytes_written": 2**21, "bytes_total": 2**22}
    assert show_progress(both) == "3.0 MiB of 4.0 MiB (1.0 MiB read, 2.0 MiB written)"
    assert show_progress(both | {"bytes_per_s": 2.0**30}) == f"{show_progress(both)}, 1.00 GiB/s"
    assert show_progress(both | {"step": "speed, round 2/3"}) == "speed, round 2/3"
    assert show_progress({}) == ""


def test_durations_are_as_fine_as_they_are_known() -> None:
    shown = {0.4: "0 s", 41: "41 s", 60: "1 min", 725: "12 min 5 s", 12_000: "3 h 20 min", 187_000: "2 d 3 h"}
    assert {seconds: show_duration(seconds) for seconds in shown} == shown
    left = {1: "about 5 s", 42: "about 40 s", 90: "about 2 min", 3_580: "about 60 min", 12_130: "about 3 h 20 min"}
    assert {seconds: show_time_left(seconds) for seconds in left} == left


def test_rows_that_failed_alike_say_it_once() -> None:
    failed = {"state": "failed", "error_kind": "unsupported", "error_message": "no such layer", "protocol": None}
    rows = [result(n, scheme, **failed) for n, scheme in enumerate(("none", "bnb-int8", "bnb-nf4"), start=1)]
    table = results_table(rows)
    assert table.count("no such layer") == 1
    assert [line_of(table, f"j{n}").endswith("failed: unsupported like j1") for n in (2, 3)] == [True, True]
    assert "3 failed (j1, j2, j3 unsupported)" in table


def test_a_checkpoint_that_answered_two_batches_is_marked_in_both() -> None:
    judged = {"kl_mean": 0.01, "details": {"quality": {"kl_mean": 0.01, "kl_mean_se": 1e-4, "rows": 2000}}}
    sized = {"weights_bytes": 2**30, "checkpoint_path": "checkpoints/m/nf4"}
    first = [
        BASELINE | {"weights_bytes": 2**32, "checkpoint_path": None},
        QUANTIZED | judged | sized,
        result(3, "bnb-int8", **(sized | {"weights_bytes": 2**31, "checkpoint_path": "checkpoints/m/int8"})),
    ]
    again = [
        row
        | {"batch_id": "b2", "job_id": f"j{number}", "reused_from": row["job_id"]}
        | ({"baseline_job_id": "j4"} if row["baseline_job_id"] else {})
        for number, row in enumerate(first, start=4)
    ]
    table = results_table([*first, *again])
    marked = [line.split()[1] for line in table.splitlines() if line.startswith("✓ j")]
    assert marked == ["j2", "j5"]
    assert "6 jobs of 1 model on NVIDIA H200: 6 succeeded (3 by earlier results). Ship bnb-nf4" in table
    # Measured again, as after --force, it is still the same checkpoint.
    table = results_table([*first, *(row | {"reused_from": None} for row in again)])
    assert [line.split()[1] for line in table.splitlines() if line.startswith("✓ j")] == ["j2", "j5"]
