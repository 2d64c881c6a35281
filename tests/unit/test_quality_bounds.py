"""When a row keeps to a bound on its quality, as `compare` and `keep` judge it."""

from __future__ import annotations

import pytest

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.protocol import show_field
from qbatch.views.quality_bounds import KL_COST, QualityBound
from tests.unit.measured_rows import result


def row(kl: float, error: float | None) -> ResultRow:
    return ResultRow.from_json(result(2, "bnb-nf4", kl_mean=kl, details={"quality": {"kl_mean_se": error}}))


@pytest.mark.parametrize(
    ("kl", "error", "errors", "broken"),
    [
        (0.001, 0.0004, 2.0, None),
        (0.001, 0.0006, 2.0, "its mean KL may be over 0.002: 1.0e-03 ± 6.0e-04 nats"),
        (0.003, 0.0001, 2.0, "its mean KL, 3.0e-03 nats, is over 0.002"),
        (0.001, None, 2.0, "whether its mean KL keeps to 0.002 is not known, since its error is not"),
        (0.001, None, 0.0, None),
    ],
)
def test_two_errors_must_be_within_a_search_s_bound_and_be_known(
    kl: float, error: float | None, errors: float, broken: str | None
) -> None:
    bound = QualityBound(cost=KL_COST, limit=0.002, errors=errors)
    assert bound.broken_by(row(kl, error)) == broken


def test_texts_and_tasks_of_a_protocol_are_shown_by_their_names() -> None:
    texts = [{"name": "code", "sha256": "17eb1657" + "0" * 56}, {"name": "dialogue", "sha256": "4" * 64}]
    assert show_field("more_texts", texts) == "code@17eb1657 dialogue@44444444"
    assert show_field("more_texts", None) == "none"
    assert show_field("tasks", [{"name": "arc_easy"}]) == "arc_easy"
