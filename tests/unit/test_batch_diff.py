"""``diff`` of two batches counts a difference only if it is larger than the measured noise."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest

from qbatch.core.domain import DeviceKind, ProtocolOptions
from qbatch.views.batch_diff import batch_diff
from tests.unit.measured_rows import PROTOCOL, result
from tests.unit.printed import read

Row = dict[str, Any]


STEADY = (0.99, 1.0, 1.01)
BUSY = (0.1, 0.3, 2.6)
"""The rounds' times on a host that others use, as multiples of their mean."""


def measured(
    number: int,
    scheme: str = "bnb-nf4",
    *,
    rate: float = 40.0,
    kl: float = 0.03,
    rounds: tuple[float, ...] = STEADY,
    **fields: Any,
) -> Row:
    """A row whose rounds lie 1 % apart, unless others are given."""
    means = [1 / rate * factor for factor in rounds]
    details = {
        "rounds": {"count": 3, "interleaved_with": [], "phases": {"decode": {"p50": means, "mean": means}}},
        "quality": {"kl_mean": kl, "kl_mean_se": 0.001},
    }
    quality = {} if scheme == "none" else {"kl_mean": kl}
    return result(number, scheme, decode_tokens_per_s=rate, weights_bytes=2**30, details=details, **quality) | fields


def said(before: list[Row], after: list[Row]) -> str:
    return " ".join(batch_diff(read(before), read(after), "table").split())


def changes(before: Row, after: Row) -> dict[str, str]:
    (pair,) = json.loads(batch_diff(read([before]), read([after]), "json"))
    return {change["figure"]: change["change"] for change in pair["changes"]}


@pytest.mark.parametrize(
    ("rate", "change"), [(40.2, "within noise"), (52.0, "faster"), (30.0, "slower"), (40.0, "within noise")]
)
def test_a_speed_counts_beyond_the_spread_of_the_rounds(rate: float, change: str) -> None:
    assert changes(measured(1), measured(11, rate=rate))["decode_tokens_per_s"] == change


@pytest.mark.parametrize(
    ("rate", "change"),
    [(40 * 30, "uncertain"), (40 / 30, "uncertain"), (45, "uncertain"), (43, "within noise"), (37, "within noise")],
)
def test_a_large_difference_that_no_round_confirms_is_uncertain(rate: float, change: str) -> None:
    assert changes(measured(1), measured(11, rate=rate, rounds=BUSY))["decode_tokens_per_s"] == change


def test_uncertain_differences_are_listed_and_counted() -> None:
    before = [measured(1, "none"), measured(2, "bnb-int8"), measured(3)]
    after = [measured(11, "none"), measured(12, "bnb-int8", rate=20.0, rounds=BUSY), measured(13, rate=60.0)]
    text = said(before, after)
    assert "uncertain (1) j2 → j12 Meta-Llama-3.1-70B-Instruct bnb-int8: decode 40.0 tok/s → 20.0 tok/s ×0.50" in text
    assert "Uncertain are differences in speed of more than 10 % that the rounds do not confirm." in text
    assert "1 faster, 0 slower, 0 better, 0 worse, 1 uncertain, 1 within the measured noise." in text
    flat = csv.DictReader(io.StringIO(batch_diff(read(before), read(after), "csv")))
    assert [line["job_after"] for line in flat if line["change"] == "uncertain"] == ["j12"]


@pytest.mark.parametrize(("kl", "change"), [(0.0305, "within noise"), (0.05, "worse"), (0.01, "better")])
def test_quality_counts_beyond_its_standard_error(kl: float, change: str) -> None:
    assert changes(measured(1), measured(11, kl=kl))["kl_mean"] == change


def test_without_a_measured_noise_a_difference_is_neither() -> None:
    before, after = (result(n, "bnb-nf4", decode_tokens_per_s=rate) for n, rate in ((1, 40.0), (11, 50.0)))
    assert changes(before, after)["decode_tokens_per_s"] == "noise unknown"


def test_sizes_are_exact() -> None:
    assert changes(measured(1), measured(11, weights_bytes=2**30 - 1))["weights_bytes"] == "smaller"


@pytest.mark.parametrize(("rounds", "change"), [(STEADY, "faster"), (BUSY, "uncertain")], ids=["steady", "busy"])
def test_one_speed_of_several_models_is_one_measurement(rounds: tuple[float, ...], change: str) -> None:
    names = ("first", "second", "third")
    before = [measured(number, rate=40.0, model=name) for number, name in enumerate(names, start=1)]
    after = [measured(number, rate=60.0, model=name, rounds=rounds) for number, name in enumerate(names, start=11)]
    assert f"3 {change}" in said(before, after)
    for rows, timed in ((before, "j1"), (after, "j11")):
        for row in rows[1:]:
            row["details"] = row["details"] | {"speed_from": timed}
    text = said(before, after)
    assert "The speeds of 2 pairs are those of other models of the same shape, and are 1 measurement" in text
    assert f"1 {change}" in text
    pairs = json.loads(batch_diff(read(before), read(after), "json"))
    assert [(pair["speed_from_before"], pair["speed_from_after"]) for pair in pairs] == [
        (None, None),
        ("j1", "j11"),
        ("j1", "j11"),
    ]


def test_each_kind_of_change_has_its_list_and_the_sum_counts_all() -> None:
    before = [measured(1, "none"), measured(2, "bnb-int8"), measured(3), measured(4, "bnb-fp4")]
    after = [measured(11, "none"), measured(12, "bnb-int8", rate=60.0), measured(13, rate=60.0, kl=0.06)]
    text = said(before, after)
    assert "faster (2) j2 → j12 Meta-Llama-3.1-70B-Instruct bnb-int8: decode 40.0 tok/s → 60.0 tok/s ×1.50" in text
    assert "worse (1) j3 → j13 Meta-Llama-3.1-70B-Instruct bnb-nf4: KL 3.0e-02 → 6.0e-02 ×2.00" in text
    assert "only in the first (1): j4 " in text
    assert text.endswith(
        "3 pairs compared: 2 faster, 0 slower, 0 better, 1 worse, 1 within the measured noise; 1 only in the first."
    )


def test_what_cannot_be_compared_says_why() -> None:
    failed: Row = {
        "state": "failed",
        "error_kind": "cuda_oom",
        "details": None,
        "protocol": None,
        "protocol_hash": None,
    }
    longer = {"protocol": PROTOCOL | {"prompt_tokens": 512}, "protocol_hash": "q"}
    before = [measured(1), measured(2, "bnb-int8"), measured(3, "bnb-fp4"), measured(4, "none")]
    after = [
        measured(11, device_name="NVIDIA A100"),
        measured(12, "bnb-int8", **longer),
        measured(13, "bnb-fp4", **failed),
        measured(14, "none", reused_from="j4"),
    ]
    text = said(before, after)
    for reason in (
        "not compared (1), measured in different ways: device (NVIDIA H200, NVIDIA A100): j1 → j11 ",
        "not compared (1), measured in different ways: prompt_tokens (256, 512): j2 → j12 ",
        "not compared (1), failed in the second (cuda_oom): j3 → j13 ",
        "1 of the same measurement; 3 not compared",
    ):
        assert reason in text


def test_pairs_that_were_not_compared_are_one_line_and_in_json_all() -> None:
    before = [measured(n, "bnb-nf4", model=f"org/model-{n}") for n in range(1, 8)]
    after = [row | {"job_id": f"j1{n}", "device_name": "NVIDIA A100"} for n, row in enumerate(before[:6], start=1)]
    after.append(measured(21, "bnb-int8"))
    table = batch_diff(read(before), read(after), "table")
    assert [table.count(head) for head in ("not compared (", "not compared (6), ", "only in the ")] == [1, 1, 4]
    assert "j1 → j11 model-1 bnb-nf4" in said(before, after)
    assert "and 3 more" in said(before, after)
    pairs = json.loads(batch_diff(read(before), read(after), "json"))
    assert [(pair["job_before"], pair["job_after"]) for pair in pairs] == [
        *((f"j{n}", f"j1{n}") for n in range(1, 7)),
        ("j7", None),
        (None, "j21"),
    ]
    assert [pair["not_compared"] for pair in pairs[-2:]] == ["only in the first", "only in the second"]


def test_what_only_one_batch_measured_hinders_no_comparison_of_the_rest() -> None:
    quick = {"protocol": PROTOCOL | {"speed": False}, "protocol_hash": "q", "decode_tokens_per_s": None}
    text = said([measured(1)], [measured(11, kl=0.06, **quick)])
    assert "worse (1) j1 → j11 Meta-Llama-3.1-70B-Instruct bnb-nf4: KL 3.0e-02 → 6.0e-02 ×2.00" in text
    assert "Speed was measured in the first alone, so it is not compared. 1 pair compared: 0 faster" in text
    profiled = {"protocol": PROTOCOL | {"why": True}, "protocol_hash": "w"}
    assert "measured in different ways: why (none, yes)" in said([measured(1)], [measured(11, rate=60.0, **profiled)])


@pytest.mark.parametrize("options", [{"share_speed": False}, {"speed": False, "why": False}], ids=["each", "no speed"])
@pytest.mark.parametrize("kind", [DeviceKind.CUDA, DeviceKind.CPU])
def test_protocols_that_differ_in_their_parts_alone_are_compared(kind: DeviceKind, options: dict[str, bool]) -> None:
    """As they are, defaults included: a part must not bring anything else into the protocol."""
    asked = ProtocolOptions(eval_text_sha256="a" * 64, why=False)
    one, other = (replace(asked, **more).for_device(kind) for more in ({}, options))
    before, after = (measured(number) | {"protocol": of.to_json()} for number, of in ((1, one), (11, other)))
    assert "1 pair compared" in said([before], [after | {"decode_tokens_per_s": None}])


def test_searches_of_one_bound_are_paired_though_they_chose_other_layers() -> None:
    def search(number: int, layer: str, bound: float) -> Row:
        row = measured(number)
        asked = {"mixture": {"bound": {"max_kl": bound}}, "options": row["options"] | {"skip_modules": [layer]}}
        return row | asked

    pairs = json.loads(
        batch_diff(read([search(1, "a", 0.01), search(2, "a", 0.1)]), read([search(11, "b", 0.1)]), "json")
    )
    assert [(pair["job_before"], pair["job_after"]) for pair in pairs] == [("j2", "j11"), ("j1", None)]


def test_rows_of_the_same_protocol_are_paired_first() -> None:
    longer = {"protocol": PROTOCOL | {"prompt_tokens": 512}, "protocol_hash": "q"}
    before = [measured(1), measured(2, **longer)]
    after = [measured(11, **longer, rate=80.0), measured(12)]
    pairs = json.loads(batch_diff(read(before), read(after), "json"))
    assert [(pair["job_before"], pair["job_after"]) for pair in pairs] == [("j1", "j12"), ("j2", "j11")]


def test_versions_that_differ_are_said_once() -> None:
    def of(row: Row, torch: str) -> Row:
        return row | {"details": row["details"] | {"versions": {"torch": torch}}}

    rows = [(measured(1), measured(11)), (measured(2, "bnb-int8"), measured(12, "bnb-int8"))]
    text = said([of(row, "2.12") for row, _ in rows], [of(row, "2.13") for _, row in rows])
    assert text.count("torch (2.12, 2.13)") == 1


def test_csv_has_a_line_for_each_figure() -> None:
    lines = list(csv.DictReader(io.StringIO(batch_diff(read([measured(1)]), read([measured(11)]), "csv"))))
    assert [line["figure"] for line in lines] == ["decode_tokens_per_s", "kl_mean", "weights_bytes", "disk_bytes"]
    assert batch_diff([], [], "json") == "[]"
    assert said([], []).startswith("0 pairs compared")
