"""Tests and intervals of paired comparisons, against enumeration and NumPy."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest

from qbatch.core.statistics.clusters import cluster_sums
from qbatch.core.statistics.detectable import detectable_mean, detectable_proportion
from qbatch.core.statistics.no_difference import (
    holm,
    mcnemar,
    sign_flip,
    smallest_sign_flip_p,
)
from qbatch.core.statistics.paired_difference import (
    difference_of_clusters,
    difference_of_proportions,
    student_quantile,
)


def enumerated(sums: list[float]) -> float:
    """The p-value of the sign-flip test, by trying every assignment of signs."""
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(sums))))
    return float(np.mean(np.abs(signs @ np.array(sums)) >= abs(np.sum(sums)) - 1e-9))


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (0, 5), (3, 3), (7, 2), (2, 7), (4, 11)])
def test_mcnemar_is_the_toss_of_a_coin_for_each_question_that_changed(lost: int, gained: int) -> None:
    assert mcnemar(lost, gained) == pytest.approx(enumerated([-1.0] * lost + [1.0] * gained))


def test_sign_flips_of_few_clusters_are_all_counted() -> None:
    generator = np.random.default_rng(0)
    for clusters in range(13):
        sums = (generator.normal(0.5, 1.0, clusters)).tolist()
        assert sign_flip(sums) == pytest.approx(enumerated(sums))


def test_a_cluster_without_a_difference_changes_nothing() -> None:
    sums = [3.0, -1.0, 2.0, 2.0]
    assert sign_flip([*sums, *[0.0] * 1000]) == sign_flip(sums) == pytest.approx(enumerated(sums))


def test_sign_flips_of_many_clusters_are_drawn() -> None:
    """With one question a cluster it is McNemar's test, whose p-value is known."""
    for lost, gained in ((20, 40), (30, 33), (12, 12), (60, 110)):
        expected = mcnemar(lost, gained)
        deviation = math.sqrt(expected * (1 - expected) / 20_000)
        assert sign_flip([-1.0] * lost + [1.0] * gained) == pytest.approx(expected, abs=4 * deviation + 1e-4)


def test_sums_in_another_order_do_not_round_to_another_p_value() -> None:
    sums = [0.1, 0.2, 0.3, -0.3, 0.7]
    assert {sign_flip(list(order)) for order in itertools.permutations(sums)} == {enumerated(sums)}


def test_of_equal_models_one_in_twenty_is_called_different_at_most() -> None:
    """Clusters of three answers that go together: McNemar's test would call twice as many of them different."""
    generator = np.random.default_rng(1)
    samples = [3.0 * generator.choice([-1, 0, 0, 1], size=14) for _ in range(300)]
    assert np.mean([sign_flip(list(sums)) <= 0.05 for sums in samples]) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)
    as_questions = [mcnemar(3 * int((sums < 0).sum()), 3 * int((sums > 0).sum())) for sums in samples]
    assert np.mean(np.array(as_questions) <= 0.05) > 0.1


def test_holm_is_the_closure_of_bonferroni() -> None:
    """A test is rejected if Bonferroni's test rejects every set of hypotheses that it is in."""
    generator = np.random.default_rng(2)
    for _ in range(50):
        p_values = (generator.random(5) ** 2).tolist()
        sets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size)]
        closed = [
            max(min(1.0, len(s) * min(p_values[member] for member in s)) for s in sets if number in s)
            for number in range(5)
        ]
        assert holm(p_values) == pytest.approx(closed)
    assert holm([]) == []


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062047362), (2, 4.3026527297), (3, 3.1824463053), (7, 2.3646242516), (31, 2.0395134464)],
)
def test_quantiles_are_those_of_the_table(degrees: int, expected: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_clusters_covers_what_it_says() -> None:
    """40 means of eight clusters of unequal size: 95 % of the intervals contain the truth, which is 0.2."""
    generator = np.random.default_rng(3)
    found = []
    for _ in range(2000):
        counts = generator.integers(3, 6, size=8)
        sums = [float((0.2 + generator.normal() + generator.normal(size=count)).sum()) for count in counts]
        found.append(difference_of_clusters(sums, counts.tolist()))
    covered = [each.low < 0.2 < each.high for each in found if each.low is not None and each.high is not None]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_a_mean_as_large_as_detectable_is_found_four_times_in_five() -> None:
    generator = np.random.default_rng(4)
    pilot = difference_of_clusters(generator.normal(size=400).tolist(), [1] * 400)
    detectable = detectable_mean(pilot.error, 400, significance=0.05)
    assert detectable is not None
    found = [difference_of_clusters((detectable + generator.normal(size=400)).tolist(), [1] * 400) for _ in range(500)]
    assert np.mean([each.low is not None and each.low > 0 for each in found]) == pytest.approx(0.8, abs=0.06)


def _power(p_lost: float, p_gained: float, units: int, significance: float) -> float:
    """The probability that McNemar's test shows the loss, over every outcome."""
    power = 0.0
    for lost in range(units + 1):
        for gained in range(min(lost, units - lost + 1)):
            if mcnemar(lost, gained) <= significance:
                same = units - lost - gained
                ways = math.factorial(units) // math.prod(map(math.factorial, (lost, gained, same)))
                power += ways * p_lost**lost * p_gained**gained * (1 - p_lost - p_gained) ** same
    return power


@pytest.mark.parametrize("significance", [0.05, 0.05 / 6])
@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 1), (7, 3)])
def test_a_change_as_large_as_detectable_is_shown_four_times_in_five(
    lost: int, gained: int, significance: float
) -> None:
    units, against = 60, min(lost, gained) / 60
    found = detectable_proportion(lost, gained, units, significance=significance)
    assert found is not None
    assert _power(found + against, against, units, significance) == pytest.approx(0.8, abs=1e-4)
    assert detectable_proportion(gained, lost, units, significance=significance) == found


@pytest.mark.parametrize(("units", "lost", "gained"), [(1200, 80, 70), (4000, 130, 110)])
def test_where_many_answers_change_draws_show_the_same(units: int, lost: int, gained: int) -> None:
    found = detectable_proportion(lost, gained, units, significance=0.05)
    assert found is not None
    against = gained / units
    drawn = np.random.default_rng(5).multinomial(units, [found + against, against, 1 - found - 2 * against], size=4000)
    p_value = functools.cache(mcnemar)
    assert np.mean([p_value(int(more), int(less)) <= 0.05 for more, less, _ in drawn]) == pytest.approx(0.8, abs=0.02)


def test_too_few_questions_or_clusters_can_show_nothing() -> None:
    assert mcnemar(5, 0) == 2**-4 > 0.05
    assert detectable_proportion(0, 0, 5, significance=0.05) is None
    assert detectable_proportion(0, 0, 6, significance=0.05) == pytest.approx(0.8 ** (1 / 6), rel=1e-4)
    assert smallest_sign_flip_p(4) == sign_flip([1.0] * 4) == 0.125
    assert smallest_sign_flip_p(40) == sign_flip([1.0] * 40)
    assert detectable_mean(0.01, 5, significance=0.05) is None
    assert detectable_mean(0.01, 6, significance=0.05) == pytest.approx((2.5705818 + 0.8416212) * 0.01)
    assert detectable_mean(None, 6, significance=0.05) is None


def test_the_interval_of_proportions_covers_what_it_says() -> None:
    """Every outcome of 25 questions, weighted by its probability, where one in five changes."""
    units, p_lost, p_gained = 25, 0.12, 0.08
    covered = 0.0
    for lost in range(units + 1):
        for gained in range(units + 1 - lost):
            same = units - lost - gained
            ways = math.factorial(units) / math.prod(map(math.factorial, (lost, gained, same)))
            found = difference_of_proportions(lost, gained, units)
            assert found.low is not None
            assert found.high is not None
            assert found.low <= found.mean <= found.high
            is_within = found.low <= p_gained - p_lost <= found.high
            covered += is_within * ways * p_lost**lost * p_gained**gained * (1 - p_lost - p_gained) ** same
    assert 0.94 < covered < 0.99


def test_where_no_answer_changed_the_difference_is_still_uncertain() -> None:
    found = difference_of_proportions(0, 0, 100)
    assert (found.mean, found.units) == (0.0, 100)
    assert found.high == pytest.approx(-(found.low or 0.0))


def test_of_one_cluster_no_error_is_known() -> None:
    found = difference_of_clusters([3.0], [6])
    assert (found.mean, found.error, found.low) == (0.5, None, None)


@pytest.mark.parametrize("sums", [[0.0] * 10, [0.3] * 10])
def test_of_clusters_without_scatter_no_error_is_known(sums: list[float]) -> None:
    """That none of them changed does not show that none would."""
    found = difference_of_clusters(sums, [3] * 10)
    assert found.mean == pytest.approx(sums[0] / 3)
    assert (found.error, found.low, found.high) == (None, None, None)


def test_values_are_summed_by_cluster() -> None:
    assert cluster_sums([1.0, 2.0, 4.0], ["a", "b", "a"]) == ([5.0, 2.0], [2, 1])
