"""``keep`` removes what was measured and not recommended, and nothing of which too little is known."""

from __future__ import annotations

from typing import Any

import pytest

from qbatch.views.comparison import Preference
from qbatch.views.unrecommended import unrecommended
from tests.unit.measured_rows import result
from tests.unit.printed import read


def row(number: int, scheme: str, kl: float | None, **fields: Any) -> dict[str, Any]:
    quality = {"reason": "the device was lost"} if kl is None else {"kl_mean_se": kl / 100, "rows": 1000}
    return result(
        number,
        scheme,
        weights_bytes=number,
        kl_mean=kl,
        details={"quality": quality},
        **({"checkpoint_path": f"checkpoints/m/{scheme}-{number}", "decode_tokens_per_s": 30.0 / number} | fields),
    )


@pytest.mark.parametrize("prefer", ["size", "quality", "speed"])
def test_what_was_not_measured_is_kept(prefer: str) -> None:
    small, unknown = row(1, "bnb-nf4", 0.01), row(2, "bnb-int8", None)
    found = unrecommended([read([small, unknown])], Preference(prefer=prefer))
    assert found.paths == ()
    worse = row(3, "bnb-fp4", 0.02)
    found = unrecommended([read([small, unknown, worse])], Preference(prefer=prefer))
    assert found.paths == ("checkpoints/m/bnb-fp4-3",)


def test_what_lacks_a_further_text_is_kept() -> None:
    """Its first text was measured, and the second could not be."""
    texts = {"code": {"quality": {"reason": "out of memory"}}}
    second = row(2, "bnb-int8", 0.002)
    second["details"] |= {"more_texts": texts}
    rows = [row(1, "bnb-nf4", 0.01), second]
    assert unrecommended([read(rows)], Preference()).paths == ()


def test_without_a_rate_nothing_is_said_of_the_fastest() -> None:
    rows = [row(1, "bnb-nf4", 0.01), row(2, "bnb-int8", 0.002, decode_tokens_per_s=None)]
    assert unrecommended([read(rows)], Preference(prefer="speed")).paths == ()
    assert unrecommended([read(rows)], Preference(min_tokens_per_s=1.0)).paths == ()
    assert unrecommended([read(rows)], Preference()).paths == ("checkpoints/m/bnb-int8-2",)


@pytest.mark.parametrize("preference", [Preference(max_kl=0.001), Preference(prefer="speed")])
def test_where_the_baseline_is_recommended_nothing_is_removed(preference: Preference) -> None:
    baseline = result(4, checkpoint_path=None, weights_bytes=100, decode_tokens_per_s=50.0)
    rows = [baseline, row(1, "bnb-nf4", 0.01), row(2, "bnb-int8", 0.002)]
    found = unrecommended([read(rows)], preference)
    assert found.paths == ()
    assert "the baseline (j4) is recommended" in found.remarks[0]
    assert unrecommended([read(rows)], Preference()).paths == ("checkpoints/m/bnb-int8-2",)


def test_where_the_recommended_checkpoint_is_gone_nothing_is_removed() -> None:
    rows = [row(1, "bnb-nf4", 0.01, checkpoint_path=None), row(2, "bnb-int8", 0.002)]
    found = unrecommended([read(rows)], Preference())
    assert found.paths == ()
    assert "its checkpoint is gone" in found.remarks[0]
