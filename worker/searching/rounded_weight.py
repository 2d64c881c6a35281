"""A weight as a checkpoint would compute with it, and what rounding does to it, without running the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qbatch.core.search.sensitivity import WeightErrors
from qbatch.worker.methods.packing import Packing

# Values at once: on a CPU all that is computed of a piece stays in its cache; on a GPU fewer would take longer to
# launch than to compute. Both are whole numbers of nested blocks.
_PIECE = {"cpu": 2**20, "cuda": 2**26}


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredErrors:
    """Sums of squares over a weight: of its values, and of the errors of three roundings."""

    values: float
    quantized: float
    min_max_4_bits: float
    min_max_8_bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedWeight:
    """``values`` has the shape and dtype of the weight."""

    values: torch.Tensor
    errors: SquaredErrors


@torch.no_grad()
def rounded_weight(weight: torch.Tensor, packing: Packing) -> RoundedWeight:
    """``weight`` [rows, columns], as it is quantized, rounded piece by piece."""
    exact = weight.reshape(-1)
    rounded, offset = torch.empty_like(exact), packing.nested_offset(weight)
    lowest, highest = (each.float() for each in exact.aminmax())
    sums = torch.zeros(4, dtype=torch.float64, device=weight.device)
    for begin in range(0, len(exact), _PIECE[weight.device.type]):
        piece = exact[begin : begin + _PIECE[weight.device.type]].float()
        restored = packing.rounded(piece, offset)
        rounded[begin : begin + len(piece)] = restored
        sums[0] += _squares(piece)
        sums[1] += _squares(restored.sub_(piece))
        sums[2] += min_max_squares(piece, lowest, highest, 4)
        sums[3] += min_max_squares(piece, lowest, highest, 8)
    values, quantized, four, eight = sums.tolist()
    return RoundedWeight(
        values=rounded.view(weight.shape),
        errors=SquaredErrors(values=values, quantized=quantized, min_max_4_bits=four, min_max_8_bits=eight),
    )


def weight_errors(weights: Iterable[SquaredErrors]) -> WeightErrors:
    """The errors of several weights taken together."""
    each = list(weights)
    norm = math.sqrt(math.fsum(one.values for one in each)) or 1.0
    return WeightErrors(
        quantized=math.sqrt(math.fsum(one.quantized for one in each)) / norm,
        min_max_4_bits=math.sqrt(math.fsum(one.min_max_4_bits for one in each)) / norm,
        min_max_8_bits=math.sqrt(math.fsum(one.min_max_8_bits for one in each)) / norm,
    )


def min_max_squares(piece: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, bits: int) -> torch.Tensor:
    """The sum of the squared errors of replacing each value of ``piece`` by the nearest of 2^bits evenly spaced levels
    from ``lowest`` to ``highest``."""
    step = (highest - lowest) / (2**bits - 1)
    # If all values are equal, they are the only level.
    places = (piece - lowest).div_(step.clamp(min=torch.finfo(torch.float32).tiny))
    squares: torch.Tensor = _squares(places.sub_(places.round())) * step.double().square()
    return squares


def _squares(values: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(values)
    return norm.double().square()
