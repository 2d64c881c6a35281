"""What is shipped of a model that was searched within a bound: what keeps to it, unless the user says another."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qbatch.views.comparison import Preference
from qbatch.views.unrecommended import unrecommended
from tests.unit.measured_rows import result
from tests.unit.printed import comparison, read, results_table

Row = dict[str, Any]


def nf4(number: int, gib: float, kl: float, *, error: float = 1e-5, skips: int = 0, **fields: Any) -> Row:
    row = result(
        number,
        "bnb-nf4",
        weights_bytes=round(gib * 2**30),
        kl_mean=kl,
        top1_agreement=0.9,
        details={"quality": {"kl_mean": kl, "kl_mean_se": error, "rows": 2000}},
    )
    return row | {"options": row["options"] | {"skip_modules": [f"layers.{n}" for n in range(skips)]}} | fields


def searched(bound: dict[str, Any], **fields: Any) -> list[Row]:
    """A baseline, plain NF4, three mixtures, and the search that the third one answered."""
    point = nf4(5, 1.7, 7e-4, skips=3, mixture={"job_id": "j6", "point": 3})
    search = point | {"job_id": "j6", "reused_from": "j5", "mixture": {"bound": bound}}
    return [
        result(1, weights_bytes=3 * 2**30, checkpoint_path=None),
        nf4(2, 1.4, 2e-3),
        nf4(3, 1.5, 1.2e-3, skips=1),
        nf4(4, 1.6, 9.9e-4, skips=2, mixture={"job_id": "j6", "point": 2}),
        point,
        search | fields,
    ]


def picks(rows: list[Row]) -> list[str]:
    return [line.split()[1] for line in results_table(rows).splitlines() if line.startswith("✓ j")]


def test_two_errors_count_on_every_text() -> None:
    rows = searched({"max_kl": 1.1e-3})
    rows[3]["details"] |= {"more_texts": {"code": {"quality": {"kl_mean": 1.09e-3, "kl_mean_se": 1e-5}}}}
    assert picks(rows) == ["j5", "j6"]


def test_without_a_search_the_default_bound_decides() -> None:
    assert picks(searched({"max_kl": 1e-3})[:5]) == ["j2"]


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        # j4 is below it by less than two errors, and the search did not take it either.
        ({"max_kl": 1e-3}, ["j5", "j6"]),
        ({"max_kl": 1.1e-3}, ["j4"]),
        ({"max_weights_bytes": round(1.65 * 2**30)}, ["j4"]),
    ],
)
def test_the_bound_of_a_search_decides(bound: dict[str, Any], expected: list[str]) -> None:
    assert picks(searched(bound)) == expected


def test_the_sum_of_it_all_says_that_a_mixture_ships() -> None:
    text = " ".join(results_table(searched({"max_kl": 1e-3})).split())
    assert "Ship a mixture of bnb-nf4 of 1 model" in text


def test_where_no_mixture_keeps_to_it_the_baseline_is_left() -> None:
    failed = {"state": "failed", "error_kind": "bound_not_kept", "reused_from": None, "protocol": None, "details": None}
    assert picks(searched({"max_kl": 1e-4}, **failed, protocol_hash=None)) == ["j1"]


def test_until_the_search_has_ended_nothing_is_shipped() -> None:
    open_ = {"state": "running", "reused_from": None, "protocol": None, "details": None, "protocol_hash": None}
    rows = [*searched({"max_kl": 1e-3})[:3], searched({"max_kl": 1e-3}, **open_)[-1]]
    assert picks(rows) == []
    said = comparison(rows, Preference(), by="figure", format="table")
    assert "Nothing is recommended yet: the search for the layers to keep at 16 bits has not ended." in said


def test_a_search_that_keeps_nothing_recommends_the_plain_checkpoint() -> None:
    plain = nf4(2, 1.4, 2e-3)
    point = plain | {"job_id": "j3", "reused_from": "j2", "mixture": {"job_id": "j4", "point": 0}}
    search = plain | {"job_id": "j4", "reused_from": "j2", "mixture": {"bound": {"max_kl": 0.1}}}
    rows = [searched({"max_kl": 0.1})[0], plain, point, search]
    assert picks(rows) == ["j2", "j3", "j4"]
    said = comparison(rows, Preference(), by="figure", format="table")
    assert ("Ship bnb-nf4 (j2): " in said, "mixture 0" in said) == (True, False)


def test_what_the_user_says_now_goes_before_it() -> None:
    (model,) = json.loads(comparison(searched({"max_kl": 1e-3}), Preference(max_kl=0.01), by="figure", format="json"))
    assert model["groups"][0]["recommendation"]["ship"] == "j2"


def test_a_rate_is_asked_for_besides() -> None:
    rows = [row | {"decode_tokens_per_s": 30.0 + number} for number, row in enumerate(searched({"max_kl": 1e-3}))]
    (model,) = json.loads(comparison(rows, Preference(min_tokens_per_s=20.0), by="figure", format="json"))
    assert model["groups"][0]["recommendation"]["ship"] == "j5"


def test_compare_says_whose_bound_it_is() -> None:
    said = " ".join(comparison(searched({"max_kl": 1e-3}), Preference(), by="figure", format="table").split())
    assert "a mean KL of at most 0.001 nats (the bound of --scheme auto; --max-kl changes it)" in said
    said = " ".join(
        comparison(searched({"max_weights_bytes": 2**31}), Preference(), by="figure", format="table").split()
    )
    assert (
        "Chosen: what is nearest to the baseline, with weights of at most 2.00 GiB (the bound of --scheme auto" in said
    )


def test_keep_removes_no_mixture_that_a_search_was_asked_for() -> None:
    rows = [row | {"checkpoint_path": f"checkpoints/{row['kl_mean']}"} for row in searched({"max_kl": 1e-3})[1:]]
    found = unrecommended([read([searched({"max_kl": 1e-3})[0], *rows])], Preference())
    assert found.paths == ("checkpoints/0.00099", "checkpoints/0.0012", "checkpoints/0.002")


def test_a_search_is_not_called_an_earlier_result() -> None:
    assert "6 jobs of 1 model on NVIDIA H200: 6 succeeded. Ship" in results_table(searched({"max_kl": 1e-3}))


def test_layers_that_were_asked_for_at_16_bits_are_not_warned_of() -> None:
    def said(reason: str) -> str:
        kept = [{"name": "mlp", "reason": reason, "parameters": 5_000_000_000}]
        row = nf4(2, 1.4, 2e-3, quantized_fraction=0.2)
        return results_table([result(1), row | {"details": row["details"] | {"audit": {"kept": kept}}}])

    assert "only 20 % of its parameters are stored in 4 bits" in said("not a linear layer")
    assert "of its parameters" not in said("skipped on request")
