"""Factors of a weight's error against NumPy in float64: plain, and weighted by the inputs' second moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qbatch.core.errors import UsageError
from qbatch.core.recovery import Recovery, RecoveryKind
from qbatch.worker.recovering.low_rank_factors import LowRankFactors, low_rank_factors

SHAPES = [(24, 40), (40, 24), (32, 32)]


def error_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def moments_of(columns: int, rows: int) -> torch.Tensor:
    """Those of ``rows`` inputs, some of whose entries are far larger than others."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(-2, 2, columns, dtype=torch.float64)
    inputs = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scales
    mixed = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return mixed.T @ mixed / rows


def product(factors: LowRankFactors) -> np.ndarray:
    return np.asarray(factors.up) @ np.asarray(factors.down)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_factors_are_the_truncated_decomposition(shape: tuple[int, int]) -> None:
    error = error_of(shape)
    factors = low_rank_factors(error, 5)
    assert factors.up.shape == (shape[0], 5)
    assert factors.down.shape == (5, shape[1])
    np.testing.assert_allclose(product(factors), truncated(np.asarray(error), 5), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_factors_are_the_closed_form(shape: tuple[int, int]) -> None:
    error, moments = error_of(shape), moments_of(shape[1], 400)
    values, vectors = np.linalg.eigh(np.asarray(moments))
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    expected = truncated(np.asarray(error) @ root, 5) @ inverse
    found = product(low_rank_factors(error, 5, moments))
    # What counts is the error of the outputs: where inputs are tiny, an entry may be anything.
    np.testing.assert_allclose(found @ root, expected @ root, atol=1e-5 * np.linalg.norm(expected @ root))


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_factors_leave_less_of_the_outputs_than_plain_ones(shape: tuple[int, int]) -> None:
    error, moments = error_of(shape), moments_of(shape[1], 400)

    def output_error(factors: LowRankFactors) -> float:
        left = np.asarray(error) - product(factors)
        return float(np.trace(left @ np.asarray(moments) @ left.T))

    assert output_error(low_rank_factors(error, 5, moments)) < output_error(low_rank_factors(error, 5))


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_in_few_directions_are_recovered_exactly(shape: tuple[int, int]) -> None:
    error, moments = error_of(shape), moments_of(shape[1], 4)
    left = np.asarray(error) - product(low_rank_factors(error, 4, moments))
    whole = np.trace(np.asarray(error) @ np.asarray(moments) @ np.asarray(error).T)
    assert np.trace(left @ np.asarray(moments) @ left.T) < 1e-6 * whole


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [4, 20, 400])
def test_float32_finds_the_factors_of_a_short_text_and_of_unlike_inputs(shape: tuple[int, int], rows: int) -> None:
    """As on a GPU. A text of fewer tokens than a layer has inputs ended the job there."""
    error, moments = error_of(shape), moments_of(shape[1], rows)

    def output_error(dtype: torch.dtype) -> float:
        left = np.asarray(error) - product(low_rank_factors(error.to(dtype), 5, moments.to(dtype))).astype(np.float64)
        return float(np.trace(left @ np.asarray(moments) @ left.T))

    whole = float(np.trace(np.asarray(error) @ np.asarray(moments) @ np.asarray(error).T))
    assert output_error(torch.float32) == pytest.approx(output_error(torch.float64), rel=1e-2, abs=1e-5 * whole)


def test_without_any_input_weighted_factors_are_finite() -> None:
    for shape in SHAPES:
        factors = low_rank_factors(error_of(shape), 5, torch.zeros(shape[1], shape[1], dtype=torch.float64))
        assert np.isfinite(product(factors)).all()


def test_a_rank_above_that_of_the_weight_recovers_all_of_it() -> None:
    error = error_of((6, 9))
    factors = low_rank_factors(error, 16)
    assert factors.down.shape == (16, 9)
    np.testing.assert_allclose(product(factors), np.asarray(error), atol=1e-10)
    assert not factors.up[:, 6:].any()


def test_a_recovery_survives_json_and_refuses_a_rank_of_nothing() -> None:
    recovery = Recovery(kind=RecoveryKind.SVD_ACT, rank=8, text_sha256="0" * 64, window=128, windows=48)
    assert Recovery.from_json(recovery.to_json()) == recovery == Recovery.find(recovery.to_json())
    assert Recovery.find({"kind": "of newer code", "rank": 8}) is None
    assert Recovery.find(recovery.to_json() | {"of_newer_code": 1}) is None
    assert "text_sha256" not in Recovery(kind=RecoveryKind.SVD, rank=8).to_json()
    for rank in (0, -1, 5000):
        with pytest.raises(UsageError, match=f"from 1 to 4096, not {rank}"):
            Recovery(kind=RecoveryKind.SVD, rank=rank)
