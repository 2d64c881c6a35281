"""Muon in float32.

``torch.optim.Muon`` orthogonalises in bfloat16, which many CPUs only emulate, up to a hundred times slower.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

_MOMENTUM = 0.95
_STEPS = 5
# Of Keller Jordan's quintic, https://kellerjordan.github.io/posts/muon/: as steep at zero as it can be.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, each matrix's update orthogonalised, and decoupled weight decay; the arithmetic is of the
    parameters' own dtype. All parameters are matrices, and have a gradient at each step."""

    def __init__(self, matrices: Iterable[torch.Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update, by the gradients that are there."""
        for group in self.param_groups:
            for matrices in _by_shape(group["params"]):
                updates = orthogonalised(torch.stack([self._direction(matrix) for matrix in matrices]))
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])))

    def _direction(self, matrix: torch.Tensor) -> torch.Tensor:
        momentum: torch.Tensor = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
        momentum.lerp_(matrix.grad, 1 - _MOMENTUM)  # type: ignore[arg-type]
        return matrix.grad.lerp(momentum, _MOMENTUM)  # type: ignore[union-attr]


def _by_shape(matrices: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """One product of many small matrices costs less than many products of one."""
    found: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
    for matrix in matrices:
        found[matrix.shape].append(matrix)
    return found.values()


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns]: each matrix with its singular values brought near 1, by Newton and Schulz's iteration."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if is_tall else matrices
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    for _ in range(_STEPS):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), found, beta=_A)
    return found.mT if is_tall else found
