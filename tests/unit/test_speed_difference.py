"""Equal models rarely appear to differ in speed, however their noise is correlated; unequal ones do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qbatch.core.measured.metric import Metric
from qbatch.core.measured.metrics import DECODE, PER_TOKEN_P50, PREFILL
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.speed_figures import Phase, TimedRounds
from qbatch.views.noise import same_speed
from qbatch.views.speed_difference import student_t
from qbatch.worker.measuring.pooled_rounds import pool
from qbatch.worker.measuring.speed.phases import Round
from tests.unit.measured_rows import result
from tests.unit.printed import read

METRICS = (DECODE, PER_TOKEN_P50, PREFILL)
PREFILLS, STEPS, ROUNDS = 5, 63, 3
REPETITIONS = 1500
PROMPTS = torch.ones(1, 8, dtype=torch.long)


class Host:
    """A host whose speed drifts: by ``drift`` between rounds for all rows, by ``turn`` between the turns of one, and by
    ``trend`` from each turn to the next.

    Steps of a call are correlated, and a share of them, ``spikes``, takes three times as long.
    """

    def __init__(
        self, seed: int, *, drift: float, turn: float, step: float, spikes: float = 0.02, trend: float = 0.0
    ) -> None:
        self._random = np.random.default_rng(seed)
        self._drift, self._turn, self._step, self._spikes = drift, turn, step, spikes
        self._trend = trend

    def rows(self, *means_s: float, rounds: int = ROUNDS) -> list[ResultRow]:
        """Rows of a step of ``means_s`` each, timed in turns."""
        timed: list[list[Round]] = [[] for _ in means_s]
        slower = 1.0
        for number in range(rounds):
            host = math.exp(self._random.normal(0, self._drift))
            # There and back, as models take turns.
            for row in range(len(means_s))[:: -1 if number % 2 else 1]:
                turn = math.exp(self._random.normal(0, self._turn))
                timed[row].append(self._round(means_s[row] * host * turn * slower))
                slower *= 1 + self._trend
        names = [f"j{number}" for number in range(1, len(means_s) + 1)]
        return [_row(number, rounds, names) for number, rounds in enumerate(timed, start=1)]

    def apart(self, *means_s: float) -> list[ResultRow]:
        """The same rows, each timed by itself."""
        alone = (self.rows(mean_s)[0] for mean_s in means_s)
        return [replace(row, job_id=f"j{number}") for number, row in enumerate(alone, start=1)]

    def _round(self, mean_s: float) -> Round:
        steps_s = (mean_s * self._noise(STEPS)).tolist()
        prefill_s = (3 * mean_s * self._noise(PREFILLS)).tolist()
        times_s = {Phase.PREFILL: prefill_s, Phase.DECODE: [sum(steps_s)], Phase.PER_TOKEN: steps_s}
        return Round(times_s=times_s, prompts=PROMPTS, new_tokens=STEPS + 1, conditions=None)

    def _noise(self, count: int) -> Any:
        """Noise in which each value has half of the one before it."""
        fresh = self._random.normal(0, self._step, count)
        noise = [fresh[0]]
        for value in fresh[1:]:
            noise.append(0.5 * noise[-1] + value)
        spikes = np.where(self._random.random(count) < self._spikes, 3.0, 1.0)
        return np.exp(noise) * spikes


def _row(number: int, rounds: list[Round], names: list[str]) -> ResultRow:
    speed = pool(rounds)
    (row,) = read([result(number, "none" if number == 1 else "bnb-nf4")])
    others = tuple(name for name in names if name != f"j{number}")
    timed = TimedRounds(count=len(rounds), interleaved_with=others, phases=speed.by_round)
    return replace(
        row,
        prefill_s_p50=speed.prefill_s_p50,
        decode_tokens_per_s=speed.decode_tokens_per_s,
        per_token_s_p50=speed.per_token_s_p50,
        details=replace(row.details, stats=speed.stats, rounds=timed),
    )


def share_called_different(pairs: list[list[ResultRow]], metric: Metric) -> float:
    return sum(not same_speed(metric, *pair) for pair in pairs) / len(pairs)


@pytest.mark.parametrize(
    "noise",
    [
        {"drift": 0.15, "turn": 0.01, "step": 0.02},
        {"drift": 0.0, "turn": 0.05, "step": 0.02},
        {"drift": 0.05, "turn": 0.0, "step": 0.10},
        {"drift": 0.0, "turn": 0.005, "step": 0.005, "spikes": 0.0, "trend": 0.05},
    ],
    ids=["a host that drifts", "a host that differs by turn", "steps that scatter", "a host that slows"],
)
def test_of_equal_rows_under_five_per_cent_appear_different(noise: dict[str, float]) -> None:
    host = Host(7, **noise)
    pairs = [host.rows(0.02, 0.02) for _ in range(REPETITIONS)]
    shares = {metric.key: share_called_different(pairs, metric) for metric in METRICS}
    assert max(shares.values()) < 0.05, shares
    if "trend" not in noise:
        assert min(shares.values()) > 0.005, "a test that finds nothing would pass the above"


def test_equal_rows_of_different_visits_rarely_appear_different() -> None:
    host = Host(11, drift=0.05, turn=0.01, step=0.02)
    pairs = [host.apart(0.02, 0.02) for _ in range(REPETITIONS // 2)]
    assert max(share_called_different(pairs, metric) for metric in METRICS) < 0.05


def test_a_drift_that_both_rows_share_hides_no_difference() -> None:
    """One of 10 %, on a host whose speed varies by 20 % from round to round."""
    host = Host(3, drift=0.2, turn=0.01, step=0.02, spikes=0.0)
    pairs = [host.rows(0.02, 0.022) for _ in range(100)]
    assert share_called_different(pairs, DECODE) > 0.9
    apart = [host.apart(0.02, 0.022) for _ in range(100)]
    assert share_called_different(apart, DECODE) < 0.1


def test_rows_that_do_not_name_each_other_are_not_paired() -> None:
    """After a retry the first rounds of one row are not those of the other."""
    first, second = Host(5, drift=0.3, turn=0.001, step=0.001, spikes=0.0).rows(0.02, 0.022)
    assert not same_speed(DECODE, first, second)
    rounds = replace(second.details.rounds, interleaved_with=())
    retried = replace(second, details=replace(second.details, rounds=rounds))
    assert same_speed(DECODE, first, retried)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 15.895), (2, 4.849), (2.9, 4.849), (11, 2.359), (1e6, 2.076)])
def test_the_quantile_is_that_of_the_next_lower_known_freedom(freedom: float, expected: float) -> None:
    assert student_t(freedom) == expected


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 30])
def test_four_per_cent_of_student_s_distribution_lie_beyond_the_quantile(freedom: int) -> None:
    random = np.random.default_rng(0)
    share = (np.abs(random.standard_t(freedom, 400_000)) > student_t(freedom)).mean()
    assert share == pytest.approx(0.04, rel=0.05)
