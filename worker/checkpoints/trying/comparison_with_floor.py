"""Compares what a loader predicts with the reference, by what rounding to 16 bits changes anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qbatch.worker.checkpoints.trying.prediction_reference import PredictionReference
from qbatch.worker.checkpoints.trying.probe import top_logprobs

TOP = 20
"""So many tokens are compared one by one, and the others together."""
# Other kernels round as often, in another order: their largest error of some hundred positions is of this size.
_FACTOR = 4.0
# Where both dtypes are one.
_LEAST_KL = 1e-6
_LEAST_DISTANCE = 1e-5
_TINY = 1e-12

Pairs = Sequence[Sequence[Any]]
"""(token, logarithmic probability) of one position, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloorComparison:
    """The ``distance`` from the exact outputs, the largest of all positions, and the ``floor``: that of the
    checkpoint's own dtype. ``measure`` says what the distance is. One of at most ``least`` counts as none.

    ``flipped`` counts the positions with another most likely token, among the ``decided`` ones, at which its lead
    exceeds the rounding.
    """

    measure: str
    distance: float
    floor: float
    least: float
    flipped: int = 0
    decided: int = 0

    @property
    def is_same(self) -> bool:
        return self.distance <= max(_FACTOR * self.floor, self.least) and not self.flipped

    def __str__(self) -> str:
        text = f"{self.measure} at most {self.distance:.2g} (rounding alone: {self.floor:.2g})"
        if not self.decided:
            return text
        return f"{text}; another most likely token at {self.flipped} of {self.decided} positions where it is certain"


def compare(reference: PredictionReference, predicted: Mapping[str, Any]) -> FloorComparison:
    """``predicted`` is the probe's answer."""
    if reference.is_logits:
        return _of_logprobs(reference, predicted["logprobs"])
    return _of_vectors(reference, predicted["hidden"])


def _of_logprobs(reference: PredictionReference, predicted: Sequence[Sequence[Pairs]]) -> FloorComparison:
    exact = [logits.log_softmax(-1) for logits in reference.exact]
    own = [top_logprobs(logits, TOP) for logits in reference.rounded]
    flips = list(_flips(reference, predicted))
    return FloorComparison(
        measure="KL",
        distance=_largest_kl(exact, predicted),
        floor=_largest_kl(exact, own),
        least=_LEAST_KL,
        flipped=sum(flips),
        decided=len(flips),
    )


def _flips(reference: PredictionReference, predicted: Sequence[Sequence[Pairs]]) -> Iterator[bool]:
    """Of each decided position, in which the lead of the likeliest token exceeds what rounding changes, whether another
    token is predicted."""
    for exact, rounded, steps in zip(reference.exact, reference.rounded, predicted, strict=True):
        logprobs = exact.log_softmax(-1)
        noise = (rounded.log_softmax(-1) - logprobs).abs().max(-1).values
        values, tokens = logprobs.topk(2)
        decided = (values[:, 0] - values[:, 1] > 2 * noise).tolist()
        for is_decided, token, pairs in zip(decided, tokens[:, 0].tolist(), steps, strict=True):
            if is_decided:
                yield pairs[0][0] != token


def _largest_kl(exact: Sequence[Any], predicted: Sequence[Sequence[Pairs]]) -> float:
    return max(
        _kl(logprobs[position], pairs)
        for logprobs, steps in zip(exact, predicted, strict=True)
        for position, pairs in enumerate(steps)
    )


def _kl(logprobs: Any, pairs: Pairs) -> float:
    """KL(reference ‖ predicted) in nats, over the tokens of ``pairs`` and the rest of them taken together."""
    import torch

    tokens = torch.tensor([token for token, _ in pairs])
    p, q = logprobs[tokens].double().exp(), torch.tensor([value for _, value in pairs], dtype=torch.float64).exp()
    p_all, q_all = (torch.cat([each, (1 - each.sum()).clamp(min=_TINY).view(1)]) for each in (p, q))
    return max(0.0, float((p_all * (p_all.clamp(min=_TINY) / q_all.clamp(min=_TINY)).log()).sum()))


def _of_vectors(reference: PredictionReference, predicted: Sequence[Any]) -> FloorComparison:
    import torch

    found = [torch.tensor(vectors) for vectors in predicted]
    return FloorComparison(
        measure="relative distance of the vectors",
        distance=_largest_distance(reference.exact, found),
        floor=_largest_distance(reference.exact, reference.rounded),
        least=_LEAST_DISTANCE,
    )


def _largest_distance(exact: Sequence[Any], found: Sequence[Any]) -> float:
    return max(
        float((other - one).norm() / one.norm().clamp(min=_TINY)) if other.shape == one.shape else float("inf")
        for one, other in zip(exact, found, strict=True)
    )
