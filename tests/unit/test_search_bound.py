"""From a frontier and a bound to the mixture to publish: a bound holds with two errors, and three are tried at most."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qbatch.core.errors import UsageError
from qbatch.core.search.bound import Bound
from qbatch.core.search.frontier import Frontier, FrontierPoint
from qbatch.core.search.next_step import BoundMet, BoundMissed, PublishPoint, TriedPoint, next_step
from qbatch.core.search.sensitivity import Estimate

KL = [0.10, 0.05, 0.03, 0.02, 0.01, 0.004, 0.0]


def figure(mean: float, error: float | None = 0.001) -> Estimate:
    return Estimate(mean=mean, standard_error=error)


def frontier(kl: list[float] | None = None, error: float | None = 0.001) -> Frontier:
    points = tuple(
        FrontierPoint(
            added=(f"g{index}",) if index else (),
            modules=tuple(f"m{number}" for number in range(index)),
            weights_bytes=1000 + 100 * index,
            kl=figure(value, error),
            ln_ppl_ratio=figure(value / 2, error),
        )
        for index, value in enumerate(kl or KL)
    )
    return Frontier(method="bnb-nf4", windows=8, rows=800, points=points, forward_passes=9.0)


def row(index: int, kl: float, error: float | None = 0.001, ratio: float = 0.0) -> TriedPoint:
    return TriedPoint(
        index=index, weights_bytes=1000 + 100 * index, kl=figure(kl, error), ln_ppl_ratio=figure(ratio, error)
    )


def test_the_smallest_mixture_within_the_bound_with_two_errors_is_first() -> None:
    assert next_step(frontier(), Bound(max_kl=0.032), ()) == PublishPoint(index=2)
    assert next_step(frontier(), Bound(max_kl=0.0319), ()) == PublishPoint(index=3)


def test_a_ratio_of_perplexities_is_bounded_by_its_logarithm() -> None:
    assert next_step(frontier(), Bound(max_ppl_ratio=math.exp(0.0171)), ()) == PublishPoint(index=2)
    met = next_step(frontier(), Bound(max_ppl_ratio=1.02), [row(2, kl=9.0, ratio=0.0178)])
    assert met == BoundMet(index=2)


def test_of_a_number_of_bytes_the_best_that_fits_is_chosen() -> None:
    assert next_step(frontier(), Bound(max_weights_bytes=1399), ()) == PublishPoint(index=3)
    worse_at_the_end = frontier([0.1, 0.05, 0.02, 0.03])
    assert next_step(worse_at_the_end, Bound(max_weights_bytes=1300), ()) == PublishPoint(index=2)
    assert next_step(frontier(), Bound(max_weights_bytes=1300), [row(3, kl=1.0)]) == BoundMet(index=3)


def test_of_mixtures_alike_within_a_number_of_bytes_the_smallest_is_taken() -> None:
    whole = frontier()
    alike = replace(whole, points=(*whole.points[:3], replace(whole.points[3], same_as=1), *whole.points[4:]))
    assert next_step(alike, Bound(max_weights_bytes=1399), ()) == PublishPoint(index=1)
    assert next_step(alike, Bound(max_weights_bytes=1299), ()) == PublishPoint(index=2)


def test_a_bound_below_what_16_bit_arithmetic_causes_is_said() -> None:
    missed = next_step(replace(frontier(KL[:3]), floor_kl=0.035), Bound(max_kl=0.001), ())
    assert isinstance(missed, BoundMissed)
    assert missed.reason == (
        "no mixture was found with a KL of at most 0.001, two errors included: the lowest KL on the search text is "
        "0.03 ± 0.001, at 1,200 bytes, and 16-bit arithmetic alone causes 0.035"
    )


def test_a_row_whose_error_is_not_known_meets_no_bound_on_kl() -> None:
    published = next_step(frontier(), Bound(max_kl=0.5), [row(1, kl=0.001, error=None)])
    assert published == BoundMissed(
        nearest=1,
        reason="a mixture was published, but nobody can say whether it has a KL of at most 0.5: KL 0.001 (error "
        "unknown, one window); a longer evaluation text has several windows",
    )
    missed = next_step(frontier(error=None), Bound(max_kl=0.5), ())
    assert isinstance(missed, BoundMissed)
    assert "error unknown, one window" in missed.reason


def test_a_row_over_the_bound_leads_to_the_next_that_is_predicted_to_hold() -> None:
    # The evaluation text asked for twice what the search text did, so point 3 (0.022, twice 0.044) is passed over.
    assert next_step(frontier(), Bound(max_kl=0.032), [row(2, kl=0.062)]) == PublishPoint(index=4)
    # A little over, and the next one does.
    assert next_step(frontier(), Bound(max_kl=0.032), [row(2, kl=0.0305)]) == PublishPoint(index=3)


def test_without_any_that_is_predicted_to_hold_the_next_larger_is_tried() -> None:
    assert next_step(frontier(KL[:4]), Bound(max_kl=0.023), [row(2, kl=0.9)]) == PublishPoint(index=3)


def test_after_three_tries_the_nearest_is_named() -> None:
    rows = [row(2, 0.05), row(3, 0.04), row(4, 0.045)]
    missed = next_step(frontier(), Bound(max_kl=0.032), rows)
    assert isinstance(missed, BoundMissed)
    assert missed.nearest == 3
    assert missed.reason == (
        "3 mixtures were published and none has a KL of at most 0.032, two errors included; the nearest, mixture 3, "
        "keeps 3 layers at 16 bits: KL 0.04 ± 0.001"
    )


def test_the_nearest_is_so_with_its_errors() -> None:
    rows = [row(2, 0.031, error=0.01), row(3, 0.033), row(4, 0.04)]
    missed = next_step(frontier(), Bound(max_kl=0.032), rows)
    assert isinstance(missed, BoundMissed)
    assert missed.nearest == 3


def test_a_ratio_that_is_missed_is_shown_as_one() -> None:
    missed = next_step(frontier(), Bound(max_ppl_ratio=1.001), [row(each, 0.1, ratio=0.02) for each in (4, 5, 6)])
    assert isinstance(missed, BoundMissed)
    assert missed.reason.endswith("mixture 4, keeps 4 layers at 16 bits: ratio 1.0202 ± 0.001")
    missed = next_step(frontier(KL[:2]), Bound(max_ppl_ratio=1.001), ())
    assert isinstance(missed, BoundMissed)
    assert missed.reason == (
        "no mixture was found with a perplexity ratio of at most 1.001, two errors included: the lowest ratio on the "
        "search text is 1.0253 ± 0.001"
    )
    whole = frontier()
    without = replace(whole, points=tuple(replace(point, ln_ppl_ratio=None) for point in whole.points))
    missed = next_step(without, Bound(max_ppl_ratio=1.001), ())
    assert isinstance(missed, BoundMissed)
    assert missed.reason.endswith("the search text gives this model no perplexity")


def test_the_third_try_counts_if_it_is_within_the_bound() -> None:
    assert next_step(frontier(), Bound(max_kl=0.032), [row(2, 0.05), row(3, 0.04), row(4, 0.03)]) == BoundMet(index=4)


def test_where_the_frontier_ends_no_other_point_is_tried() -> None:
    missed = next_step(frontier(), Bound(max_kl=0.001), [row(6, 0.02)])
    assert missed == BoundMissed(
        nearest=6,
        reason="1 mixture was published and none has a KL of at most 0.001, two errors included; the nearest, mixture "
        "6, keeps 6 layers at 16 bits: KL 0.02 ± 0.001",
    )


def test_a_bound_below_everything_says_what_was_found() -> None:
    missed = next_step(frontier(), Bound(max_weights_bytes=900), ())
    assert isinstance(missed, BoundMissed)
    assert missed.nearest is None
    assert missed.reason == (
        "no mixture was found with at most 900 bytes of weights: with every layer quantized the weights take 1,000 "
        "bytes"
    )
    missed = next_step(frontier(KL[:2]), Bound(max_kl=0.01), ())
    assert isinstance(missed, BoundMissed)
    assert "the lowest KL on the search text is 0.05 ± 0.001, at 1,100 bytes" in missed.reason


def test_exactly_one_bound_is_given_and_it_is_above_zero() -> None:
    for given in ({}, {"max_kl": 0.1, "max_weights_bytes": 5}):
        with pytest.raises(UsageError, match="exactly one"):
            Bound(**given)  # type: ignore[arg-type]
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="--max-kl must be a finite number above 0"):
            Bound(max_kl=value)


def test_a_frontier_survives_json() -> None:
    assert Frontier.from_json(frontier().to_json()) == frontier()
