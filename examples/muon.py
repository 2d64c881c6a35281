"""The Muon optimizer in float32.

``torch.optim.Muon`` orthogonalizes in bfloat16, which many CPUs only emulate, up to a hundred times slower.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

_MOMENTUM = 0.95
_STEPS = 5
# The coefficients of Keller Jordan's quintic, chosen for the steepest slope at zero:
# https://kellerjordan.github.io/posts/muon/
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalized updates and decoupled weight decay, computed in the parameters' own dtype.
    All parameters must be matrices, and have a gradient at each step."""

    def __init__(self, matrices: Iterable[torch.Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters with their current gradients."""
        for group in self.param_groups:
            for matrices in _by_shape(group["params"]):
                updates = orthogonalized(torch.stack([self._direction(matrix) for matrix in matrices]))
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])))

    def _direction(self, matrix: torch.Tensor) -> torch.Tensor:
        momentum: torch.Tensor = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
        momentum.lerp_(matrix.grad, 1 - _MOMENTUM)  # type: ignore[arg-type]
        return matrix.grad.lerp(momentum, _MOMENTUM)  # type: ignore[union-attr]


def _by_shape(matrices: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Group matrices by shape, because one batched product is faster than many small ones."""
    groups: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
    for matrix in matrices:
        groups[matrix.shape].append(matrix)
    return groups.values()


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of each matrix in ``matrices`` [n, rows, columns] close to 1, with the Newton–Schulz
    iteration."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    result = matrices.mT if is_tall else matrices
    result = result / result.norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    for _ in range(_STEPS):
        gram = result @ result.mT
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), result, beta=_A)
    return result.mT if is_tall else result
