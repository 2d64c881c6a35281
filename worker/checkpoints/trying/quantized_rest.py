"""Tells whether a loader quantizes the layers that a checkpoint leaves at 16 bits.

In some models quantizing them changes less than rounding does, so the distance alone does not tell. But it moves each
prediction in a direction that is known, and rounding moves it in any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qbatch.worker.checkpoints.trying.comparison_with_floor import STANDARD_ERRORS, TOP, Pairs
from qbatch.worker.checkpoints.trying.prediction_reference import PredictionReference
from qbatch.worker.checkpoints.trying.probe import top_logprobs

# Halfway between none of the change and all of it.
_HALF = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRest:
    """``share``: how much of the change by quantizing the layers named ``left`` is in what the loader predicts, about 0
    if it leaves them alone and 1 if it quantizes them; ``error`` is its standard error. ``noise`` is the largest share
    that rounding alone may have: what it has here, and three standard errors."""

    left: tuple[str, ...]
    share: float
    error: float
    noise: float

    @property
    def is_told(self) -> bool:
        return self.noise < _HALF

    @property
    def is_quantized(self) -> bool:
        return self.is_told and self.share > _HALF

    def __str__(self) -> str:
        names = ", ".join(self.left)
        if not self.is_told:
            return f"whether it leaves {names} at 16 bits cannot be told on this model: rounding hides it"
        does = f"quantizes {names}, left at 16 bits" if self.is_quantized else f"leaves {names} at 16 bits"
        return f"it {does}: {self.share:.2f} ± {self.error:.1g} of what quantizing them changes"


def quantized_rest(reference: PredictionReference, predicted: Mapping[str, Any]) -> QuantizedRest | None:
    """``predicted`` is the probe's answer. None if the checkpoint leaves no layer at 16 bits that could be
    quantized."""
    if not reference.left:
        return None
    share, error = _share(reference, predicted["logprobs"])
    # They leave these layers alone.
    roundings = [_share(reference, [top_logprobs(logits, TOP) for logits in each]) for each in reference.roundings]
    noise = max(abs(own) + STANDARD_ERRORS * max(error, own_error) for own, own_error in roundings)
    return QuantizedRest(left=reference.left, share=share, error=error, noise=noise)


def _share(reference: PredictionReference, predicted: Sequence[Sequence[Pairs]]) -> tuple[float, float]:
    """The share and its standard error, by least squares over all positions and tokens; a token counts by its
    probability, as it does in the divergence."""
    import torch

    products, squares = [], []
    for exact, further, steps in zip(reference.exact, reference.further, predicted, strict=True):
        before, after = exact.log_softmax(-1).double(), further.log_softmax(-1).double()
        for own, moved, pairs in zip(before, after, steps, strict=True):
            tokens = torch.tensor([token for token, _ in pairs])
            values = torch.tensor([value for _, value in pairs], dtype=torch.float64)
            change = (moved - own)[tokens]
            weight = own[tokens].exp()
            products.append((weight * change * (values - own[tokens])).sum())
            squares.append((weight * change**2).sum())
    product, square = torch.stack(products), torch.stack(squares)
    if not square.sum():
        return 0.0, float("inf")
    share = product.sum() / square.sum()
    return float(share), float((product - share * square).norm() / square.sum())
