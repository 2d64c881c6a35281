"""Errors of quantiles: those of a bootstrap that puts each draw together."""

from __future__ import annotations

import math
import time

import pytest
import torch

from qbatch.worker.measuring.quality.quantile_errors import quantile_errors

QS = (0.5, 0.9, 0.95, 0.99)


def _windows(sizes: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(size, dtype=torch.float64, generator=generator).pow(4) for size in sizes]


def _by_sorting_each_draw(windows: list[torch.Tensor], q: float) -> float:
    draws = torch.randint(len(windows), (200, len(windows)), generator=torch.Generator().manual_seed(0)).tolist()
    values = torch.stack([torch.quantile(torch.cat([windows[number] for number in draw]), q) for draw in draws])
    return float(values.std()) * math.sqrt(len(windows) / (len(windows) - 1))


@pytest.mark.parametrize("sizes", [[7, 7, 7], [1, 200, 3, 50], [127] * 16, [1, 1]])
def test_they_are_those_of_draws_that_are_put_together(sizes: list[int]) -> None:
    windows = _windows(sizes)
    assert quantile_errors(windows, QS) == [_by_sorting_each_draw(windows, q) for q in QS]


def test_equal_values_have_no_error() -> None:
    assert quantile_errors([torch.ones(4, dtype=torch.float64)] * 3, QS) == [0.0] * 4


def test_of_a_single_window_none_is_known() -> None:
    assert quantile_errors(_windows([100]), QS) == [None] * 4


def test_of_values_that_are_not_numbers_none_is_a_number() -> None:
    windows = [*_windows([5, 5]), torch.tensor([math.nan], dtype=torch.float64)]
    assert all(error is not None and math.isnan(error) for error in quantile_errors(windows, QS))


def test_a_text_of_thirty_thousand_rows_takes_under_a_second() -> None:
    """Sorting each draw took 200 × 4 sorts, and over two seconds."""
    windows = _windows([1023] * 32)
    begin_s = time.process_time()
    quantile_errors(windows, QS)
    assert time.process_time() - begin_s < 1.0
