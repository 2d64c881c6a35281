"""A loaded model whose groups of layers can each be switched between 16 bits and their quantized values."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch

from qbatch.core.search.sensitivity import LayerGroup, WeightErrors
from qbatch.worker.methods.packing import Packing
from qbatch.worker.searching.rounded_weight import SquaredErrors, rounded_weight, weight_errors


class MixedModel:
    """Holds each weight twice: as it is, and as a checkpoint would compute with it, in the dtype of the model.

    Both copies lie on ``copies``, which may be another device than the model's, if that has no room for them. At first
    everything is at 16 bits.
    """

    def __init__(self, model: Any, groups: tuple[LayerGroup, ...], packing: Packing, *, copies: str) -> None:
        self.model, self.groups = model, groups
        self._modules = {name: model.get_submodule(name) for group in groups for name in group.modules}
        self._members = {group.name: group.modules for group in groups}
        self._at_16_bits: Set[str] = frozenset(self._members)
        self._exact = {name: module.weight.data.to(copies) for name, module in self._modules.items()}
        self._rounded: dict[str, torch.Tensor] = {}
        self.errors: dict[str, WeightErrors] = {}
        """What is known of the weights of each group, by its name."""
        for group in groups:
            self.errors[group.name] = weight_errors([self._round(name, packing, copies) for name in group.modules])

    def _round(self, name: str, packing: Packing, copies: str) -> SquaredErrors:
        weight = self._modules[name].weight.data
        # bitsandbytes quantizes the rows of outputs; Conv1D keeps its weight the other way round.
        is_turned = not isinstance(self._modules[name], torch.nn.Linear)
        rounded = rounded_weight(weight.t() if is_turned else weight, packing)
        self._rounded[name] = (rounded.values.t().contiguous() if is_turned else rounded.values).to(copies)
        return rounded.errors

    @property
    def all_groups(self) -> Set[str]:
        return self._members.keys()

    def keep(self, at_16_bits: Set[str]) -> None:
        """Have exactly these groups at 16 bits, and quantize the others."""
        for group in self._at_16_bits ^ at_16_bits:
            held = self._exact if group in at_16_bits else self._rounded
            for name in self._members[group]:
                weight = self._modules[name].weight
                weight.data = held[name].to(weight.device)
        self._at_16_bits = frozenset(at_16_bits)

    def linears(self) -> dict[str, Any]:
        """The layers by name."""
        return self._modules

    def change(self, name: str) -> torch.Tensor:
        """What is added to a quantized layer's weight when it is kept at 16 bits, on the model's device."""
        device = self._modules[name].weight.device
        change: torch.Tensor = self._exact[name].to(device) - self._rounded[name].to(device)
        return change
