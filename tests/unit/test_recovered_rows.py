"""What compare says of adapters: what they win back for their bytes, and what would be the better buy."""

from __future__ import annotations

from typing import Any

from qbatch.core.measured.result_row import ResultRow
from qbatch.core.recovery import Recovery, RecoveryKind
from qbatch.views.comparison import Preference
from qbatch.views.recovered_rows import recovery_remarks
from tests.unit.measured_rows import NAME, OPTIONS, result
from tests.unit.printed import comparison

MIB = 2**20
SVD = Recovery(kind=RecoveryKind.SVD, rank=8).to_json()


def row(number: int, kl: float, mib: int, *, scheme: str = "bnb-nf4", **options: Any) -> dict[str, Any]:
    windows = [kl * (100 + each) for each in range(8)]
    quality = {"kl_mean": kl, "kl_mean_se": kl / 50, "window_kl": windows, "window_rows": [100] * 8}
    return result(
        number,
        scheme,
        kl_mean=kl,
        weights_bytes=mib * MIB,
        options={**OPTIONS, **options},
        details={"quality": quality},
    )


def remarks(*rows: dict[str, Any]) -> list[str]:
    return [*recovery_remarks([ResultRow.from_json(each) for each in rows])]


NOT_MEASURED = (
    f"Whether layers at 16 bits are a better buy than j3 bnb-nf4+svd-r8 was not measured: `qbatch submit {NAME} "
    f"--scheme auto --max-weights-bytes {1050 * MIB}` publishes the best mixture of no more bytes; with the same "
    "--measure, --eval-text, --tasks and sizes it can be compared with these."
)


def test_an_adapter_stands_beside_its_plain_checkpoint() -> None:
    line, hint = remarks(row(2, 0.02, 1000), row(3, 0.01, 1050, recovery=SVD))
    assert hint == NOT_MEASURED
    assert line == "j3 bnb-nf4+svd-r8 has 50.0 % of the KL of j2 bnb-nf4, for 50.0 MiB more weights (5.0 %)."


def test_a_mixture_that_is_nearer_for_no_more_bytes_is_the_better_buy() -> None:
    mixed = row(4, 0.004, 1040, skip_modules=["model.layers.0"])
    _, line = remarks(row(2, 0.02, 1000), row(3, 0.01, 1050, recovery=SVD), mixed)
    assert line == (
        "j4 bnb-nf4 without model.layers.0 is a better buy than j3 bnb-nf4+svd-r8: its KL is 4.0e-03 with 1.02 GiB "
        "of weights, against 1.0e-02 with 1.03 GiB."
    )
    larger = row(4, 0.004, 1060, skip_modules=["model.layers.0"])
    assert remarks(row(2, 0.02, 1000), row(3, 0.01, 1050, recovery=SVD), larger)[1:] == [NOT_MEASURED]


def test_an_adapter_nearer_than_the_mixture_of_its_bytes_is_a_better_buy() -> None:
    smaller = row(5, 0.015, 1020, skip_modules=["model.layers.1"])
    worse = row(4, 0.012, 1040, skip_modules=["model.layers.0"])
    _, line = remarks(row(2, 0.02, 1000), row(3, 0.01, 1050, recovery=SVD), smaller, worse)
    assert line == (
        "j3 bnb-nf4+svd-r8 is a better buy than j4 bnb-nf4 without model.layers.0: its KL is 1.0e-02 with 1.03 GiB of "
        "weights, against 1.2e-02 with 1.02 GiB."
    )
    as_near = row(4, 0.01, 1040, skip_modules=["model.layers.0"])
    _, line = remarks(row(2, 0.02, 1000), row(3, 0.01, 1050, recovery=SVD), as_near)
    assert line == (
        "j3 bnb-nf4+svd-r8 and j4 bnb-nf4 without model.layers.0 are not distinguishable: their KL is 1.0e-02 with "
        "1.03 GiB of weights, and 1.0e-02 with 1.02 GiB."
    )


def test_a_mixture_of_far_fewer_bytes_says_nothing_of_one_of_as_many() -> None:
    """Between the two another one may be better than both."""
    small = row(4, 0.012, 1010, skip_modules=["model.layers.0"]) | {"mixture": {"job_id": "j7", "point": 2}}
    rows = (row(2, 0.02, 1000), row(3, 0.01, 1050, recovery=SVD), small)
    assert remarks(*rows)[1:] == [NOT_MEASURED]
    # The best of as many bytes, as a search says that was asked for it.
    for most, is_answer in ((1050, True), (1020, False)):
        asked = row(7, 0.012, 1010) | {"mixture": {"bound": {"max_weights_bytes": most * MIB}}, "reused_from": "j4"}
        said = [*recovery_remarks([ResultRow.from_json(each) for each in rows], ResultRow.from_json(asked))]
        assert said[1].startswith("j3 bnb-nf4+svd-r8 is a better buy than j4") == is_answer
        assert (said[1] == NOT_MEASURED) == (not is_answer)


def test_the_search_to_ask_for_is_of_the_same_method_and_options() -> None:
    options = {"skip_modules": ["lm_head", ".*o_proj"], "double_quant": True}
    given = {"revision": "abc", "double_quant": True}
    rows = [
        row(2, 0.02, 1000, scheme="bnb-fp4", **options) | given,
        row(3, 0.01, 1050, scheme="bnb-fp4", recovery=SVD, **options) | given,
    ]
    assert (
        f"`qbatch submit {NAME}@abc --scheme auto --max-weights-bytes {1050 * MIB} --quant-type fp4 --double-quant "
        "--skip-modules lm_head,.*o_proj`"
    ) in remarks(*rows)[-1]


def test_a_better_buy_on_the_first_text_is_not_called_one_on_all() -> None:
    mixed = row(4, 0.004, 1040, skip_modules=["model.layers.0"])
    adapter = row(3, 0.01, 1050, recovery=SVD)
    for each, code, prose in ((mixed, 0.02, 0.003), (adapter, 0.01, 0.009)):
        each["details"]["more_texts"] = {
            name: {"quality": {"kl_mean": kl, "kl_mean_se": kl / 50}} for name, kl in (("code", code), ("prose", prose))
        }
    _, line = remarks(row(2, 0.02, 1000), adapter, mixed)
    assert line == (
        "j4 bnb-nf4 without model.layers.0 is a better buy than j3 bnb-nf4+svd-r8 on the first text, and not on code: "
        "its KL is 4.0e-03 with 1.02 GiB of weights, against 1.0e-02 with 1.03 GiB; on code 2.0e-02 against 1.0e-02; "
        "on prose 3.0e-03 against 9.0e-03."
    )


def test_what_cannot_be_told_apart_is_not_called_won() -> None:
    line, _ = remarks(row(2, 0.01, 1000), row(3, 0.01, 1050, recovery=SVD))
    assert line == (
        "Whether j3 bnb-nf4+svd-r8 wins anything back is not distinguishable; it has 50.0 MiB more weights (5.0 %) "
        "than j2 bnb-nf4."
    )


def test_compare_says_it() -> None:
    rows = [result(1, weights_bytes=4000 * MIB), row(2, 0.02, 1000), row(3, 0.01, 1050, recovery=SVD)]
    assert "j3 bnb-nf4+svd-r8 has 50.0 % of the KL of j2 bnb-nf4" in " ".join(
        comparison(rows, Preference(), by="figure", format="table").split()
    )


def test_rows_in_python_are_told_apart_by_adapter_and_mixture() -> None:
    mixture = {"mixture": {"job_id": "j7", "point": 3}}
    shown = [repr(ResultRow.from_json(each)) for each in (row(2, 0.02, 9, recovery=SVD), row(3, 0.02, 9) | mixture)]
    assert [text.partition("Instruct ")[2] for text in shown] == [
        "bnb-nf4+svd-r8, succeeded>",
        "bnb-nf4 mixture 3 of j7, succeeded>",
    ]
