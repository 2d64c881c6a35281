"""What quantizing took from each weight of a checkpoint: its source's values without what its codes stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qbatch.core.errors import Unsupported
from qbatch.worker.methods.implementations import weights_of_model
from qbatch.worker.methods.method_weights import MethodWeights


class WeightDifferences:
    """The differences between a ``source`` and its ``quantized`` model, both loaded, with the same layers.

    The quantized model must not have run yet: on some processors the first pass lays out its codes anew.
    """

    def __init__(self, source: Any, quantized: Any) -> None:
        self._weights = _method_weights(quantized)
        self._exact = dict(source.named_modules())
        self.layers: Mapping[str, Any] = {
            name: module
            for name, module in quantized.named_modules()
            if isinstance(getattr(module, "weight", None), torch.Tensor) and self._weights.is_quantized(module.weight)
        }
        if missing := [name for name in self.layers if name not in self._exact]:
            raise Unsupported(f"{type(source).__name__} has no layer {missing[0]}, so nothing of it can be recovered")

    @torch.no_grad()
    def of(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns] on the quantized layer's device."""
        rounded = self._weights.restored(self.layers[name].weight).to(dtype)
        exact: torch.Tensor = self._exact[name].weight
        if not isinstance(self._exact[name], torch.nn.Linear):  # GPT-2's layers hold their weights transposed
            exact = exact.T
        return exact.to(rounded.device, dtype) - rounded.view(exact.shape)


def _method_weights(model: Any) -> MethodWeights:
    weights = weights_of_model(model)
    if not isinstance(weights, MethodWeights):
        raise Unsupported(f"{type(model).__name__} is not quantized, so there is nothing to recover")
    return weights
