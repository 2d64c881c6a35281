"""The product of two thin matrices that comes nearest to an error of a weight.

A layer computes y = W·x, and its quantized one (W - E)·x. Of all products B·A of a rank, the one is chosen that leaves
the least mean square of (E - B·A)·x. With R, the mean of x·xᵀ, that is the squared norm of (E - B·A)·L, where L·Lᵀ = R.
So B·A·L must be the truncated singular value decomposition of E·L (Eckart and Young), which projects E on the first
left singular vectors U of E·L: B = U, A = Uᵀ·E. Without moments R is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankFactors:
    """``up`` [rows, rank] times ``down`` [rank, columns]: what is added to a weight."""

    up: torch.Tensor
    down: torch.Tensor


@torch.no_grad()
def low_rank_factors(error: torch.Tensor, rank: int, moments: torch.Tensor | None = None) -> LowRankFactors:
    """The factors for ``error`` [rows, columns], in its dtype, weighted by the inputs' ``moments`` [columns, columns].

    A rank above that of the error leaves the rest of the factors zero.
    """
    kept = min(rank, *error.shape)
    basis = _left_vectors(error, kept, moments)
    up = error.new_zeros(len(error), rank)
    down = error.new_zeros(rank, error.shape[1])
    up[:, :kept], down[:kept] = basis, basis.T @ error
    return LowRankFactors(up=up, down=down)


def _left_vectors(error: torch.Tensor, rank: int, moments: torch.Tensor | None) -> torch.Tensor:
    """The first left singular vectors [rows, rank] of the weighted error, by whichever side is smaller."""
    rows, columns = error.shape
    if rows <= columns:
        weighted = error if moments is None else error @ moments
        return _first_eigenvectors(weighted @ error.T, rank)
    weighted = error if moments is None else error @ _root(moments)
    right = _first_eigenvectors(weighted.T @ weighted, rank)
    basis: torch.Tensor = torch.linalg.qr(weighted @ right).Q
    return basis


def _first_eigenvectors(symmetric: torch.Tensor, rank: int) -> torch.Tensor:
    _, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    first: torch.Tensor = vectors[:, -rank:].flip(1)
    return first


def _root(moments: torch.Tensor) -> torch.Tensor:
    """L with L·Lᵀ = ``moments``.

    Inputs have fewer directions than entries if a text is short, and some directions are far weaker than others. A
    Cholesky decomposition would fail at those, in float32 above all.
    """
    values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
    root: torch.Tensor = vectors * values.clamp(min=0).sqrt()
    return root
