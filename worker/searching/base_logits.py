"""What the model at 16 bits answers on each probe, with which every mixture is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.quality.replay import hidden_and_logits, replayed_logits


class BaseLogits:
    """The logits themselves if all of them take at most ``most_bytes``; else what the output head reads, from which
    it computes them again, where that gives the same to the bit."""

    def __init__(self, model: Any, probes: Sequence[Probe], device: str, *, most_bytes: int) -> None:
        self._model, self._probes = model, probes
        self._kept: list[torch.Tensor] = []
        self._is_hidden: list[bool] = []
        for probe in probes:
            hidden, logits = hidden_and_logits(model, probe, device)
            is_hidden = hidden is not None and logits.nbytes * len(probes) > most_bytes
            self._kept.append(hidden if is_hidden and hidden is not None else logits.clone())
            self._is_hidden.append(is_hidden)

    def of(self, window: int) -> torch.Tensor:
        """[rows, vocabulary] of the probe with this number."""
        kept = self._kept[window]
        return replayed_logits(self._model, kept, self._probes[window]) if self._is_hidden[window] else kept
