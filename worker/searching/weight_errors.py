"""What rounding does to a weight, without running the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qbatch.core.search.sensitivity import WeightErrors


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredErrors:
    """Sums of squares over a weight: of its values, and of the errors of three roundings."""

    values: float
    quantized: float
    min_max_4_bits: float
    min_max_8_bits: float


def squared_errors(exact: torch.Tensor, rounded: torch.Tensor) -> SquaredErrors:
    """Those of the weight ``exact``, which the method rounds to ``rounded``."""
    return SquaredErrors(
        values=_squares(exact),
        quantized=_squares(exact - rounded),
        min_max_4_bits=_squares(exact - min_max_rounded(exact, 4)),
        min_max_8_bits=_squares(exact - min_max_rounded(exact, 8)),
    )


def weight_errors(weights: Iterable[SquaredErrors]) -> WeightErrors:
    """Those of several weights together."""
    each = list(weights)
    norm = math.sqrt(math.fsum(one.values for one in each)) or 1.0
    return WeightErrors(
        quantized=math.sqrt(math.fsum(one.quantized for one in each)) / norm,
        min_max_4_bits=math.sqrt(math.fsum(one.min_max_4_bits for one in each)) / norm,
        min_max_8_bits=math.sqrt(math.fsum(one.min_max_8_bits for one in each)) / norm,
    )


def min_max_rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """``weight`` with each value replaced by the nearest of 2^bits evenly spaced levels from its lowest value to its
    highest, float32."""
    values = weight.float()
    lowest, highest = values.aminmax()
    step = (highest - lowest) / (2**bits - 1)
    if not step > 0:
        return values
    return values.sub(lowest).div_(step).round_().mul_(step).add_(lowest)


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values.float()).double().square())
