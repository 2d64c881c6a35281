"""Compares what a loader predicts with the reference, by what rounding to 16 bits changes anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qbatch.worker.checkpoints.trying.prediction_reference import PredictionReference
from qbatch.worker.checkpoints.trying.probe import top_logprobs

TOP = 20
"""So many tokens are compared one by one, and the others together."""
STANDARD_ERRORS = 3.0
"""What differs by fewer is chance."""
# A router of a mixture that chooses another expert changes one position by far more than the floor's largest distance.
_STRAY = 2.0
_SHARE_OF_STRAYS = 0.02
# A distance of at most this counts as none. The floor itself is 0 if both dtypes are the same, and logarithms come in
# float32. In a model with random weights, rounding gives 2e-7 to 4e-7.
_LEAST_KL = 1e-7
_LEAST_DISTANCE = 1e-5
_TINY = 1e-12

Pairs = Sequence[Sequence[Any]]
"""(token, logarithmic probability) of one position, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloorComparison:
    """The ``distance`` from the exact outputs, the mean of all positions, and the ``floor``: that of the checkpoint's
    own dtype, with the kernels that round most. ``error`` is the standard error of the difference between them.
    ``measure`` says what the distance is. One of at most ``least`` counts as none.

    ``strays`` counts those of the ``positions`` that are farther away than any in the floor, by a factor of _STRAY.
    ``flipped`` counts the positions with another most likely token, among the ``decided`` ones, at which its lead
    exceeds the rounding.
    """

    measure: str
    distance: float
    floor: float
    error: float
    least: float
    positions: int
    strays: int = 0
    flipped: int = 0
    decided: int = 0

    @property
    def is_same(self) -> bool:
        is_near = self.distance <= max(self.floor + STANDARD_ERRORS * self.error, self.least)
        return is_near and self.strays <= _SHARE_OF_STRAYS * self.positions and not self.flipped

    def __str__(self) -> str:
        text = f"{self.measure} {self.distance:.2g} (rounding alone: {self.floor:.2g} ± {self.error:.1g})"
        if self.strays:
            text += f"; {self.strays} of {self.positions} positions far beyond it"
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
    floors = [_kls(exact, [top_logprobs(logits, TOP) for logits in rounded]) for rounded in reference.roundings]
    flips = list(_flips(reference, predicted))
    return _compared("KL", _kls(exact, predicted), floors, least=_LEAST_KL, flipped=sum(flips), decided=len(flips))


def _compared(
    measure: str, distances: Any, floors: Sequence[Any], *, least: float, flipped: int = 0, decided: int = 0
) -> FloorComparison:
    """``distances`` and each of ``floors``: of every position, float64 [positions]."""
    floor = max(floors, key=lambda one: float(one.mean()))
    beyond = distances - floor
    return FloorComparison(
        measure=measure,
        distance=float(distances.mean()),
        floor=float(floor.mean()),
        error=float(beyond.std() / len(beyond) ** 0.5) if beyond.isfinite().all() else 0.0,
        least=least,
        positions=len(distances),
        strays=int((distances > max(_STRAY * float(floor.max()), least)).sum()),
        flipped=flipped,
        decided=decided,
    )


def _flips(reference: PredictionReference, predicted: Sequence[Sequence[Pairs]]) -> Iterator[bool]:
    """Of each decided position, in which the lead of the likeliest token exceeds what rounding changes, whether another
    token is predicted."""
    import torch

    for exact, steps, *roundings in zip(reference.exact, predicted, *reference.roundings, strict=True):
        logprobs = exact.log_softmax(-1)
        noise = (torch.stack(roundings).log_softmax(-1) - logprobs).abs().amax(dim=(0, -1))
        values, tokens = logprobs.topk(2)
        # Both tokens may have moved by that much.
        decided = (values[:, 0] - values[:, 1] > 2 * noise).tolist()
        for is_decided, token, pairs in zip(decided, tokens[:, 0].tolist(), steps, strict=True):
            if is_decided:
                yield pairs[0][0] != token


def _kls(exact: Sequence[Any], predicted: Sequence[Sequence[Pairs]]) -> Any:
    """The divergence at every position of all prompts."""
    import torch

    found = [
        _kl(logprobs[position], pairs)
        for logprobs, steps in zip(exact, predicted, strict=True)
        for position, pairs in enumerate(steps)
    ]
    return torch.tensor(found, dtype=torch.float64)


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
    floors = [_distances(reference.exact, rounded) for rounded in reference.roundings]
    return _compared(
        "relative distance of the vectors", _distances(reference.exact, found), floors, least=_LEAST_DISTANCE
    )


def _distances(exact: Sequence[Any], found: Sequence[Any]) -> Any:
    """The relative distance at every position of all prompts; infinite in a prompt with other positions."""
    import torch

    return torch.cat(
        [
            ((other - one).norm(dim=-1) / one.norm(dim=-1).clamp(min=_TINY)).double()
            if other.shape == one.shape
            else torch.full((len(one),), float("inf"), dtype=torch.float64)
            for one, other in zip(exact, found, strict=True)
        ]
    )
