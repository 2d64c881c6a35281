"""Recover what quantizing took by factors of each weight's error, with or without regard to what the layers read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qbatch.core.domain import DType
from qbatch.core.errors import Unsupported
from qbatch.core.recovery import Recovery
from qbatch.core.search.search_protocol import SearchProtocol
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.models.load import LoadedModel, load
from qbatch.worker.recovering.adapter_files import as_stored, write_adapter
from qbatch.worker.recovering.input_moments import Moments, exact_dtype, input_moments
from qbatch.worker.recovering.low_rank_factors import LowRankFactors, low_rank_factors
from qbatch.worker.recovering.weight_differences import WeightDifferences
from qbatch.worker.searching.backward_memory import free_bytes
from qbatch.worker.searching.search_probes import search_probes

# The share of the free memory that the moments may take at a time: their sums, and as much again for one product.
_MOMENTS_SHARE = 4
_LAYERS_BETWEEN_REPORTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryWork:
    """What an adapter is made from: a ``source``, the checkpoint ``base`` of it in ``dtype``, and for weighted factors
    the ``text`` that the layers read."""

    source: Path
    base: Path
    recovery: Recovery
    dtype: DType
    device: str
    trusted: bool = False
    text: str | None = None

    def load(self) -> LoadedModel:
        """The checkpoint, without an adapter."""
        return load(self.base, dtype=self.dtype, device=self.device, trusted=self.trusted)


@dataclass(slots=True, kw_only=True)
class _Squares:
    """Sums of squares over all layers: of what quantizing took, and of what the factors leave of it."""

    taken: float = 0.0
    left: float = 0.0

    def add(self, taken: torch.Tensor, left: torch.Tensor) -> None:
        self.taken += float(taken)
        self.left += float(left)

    @property
    def share(self) -> float:
        return math.sqrt(self.left / self.taken) if self.taken else 0.0


def recover_by_factors(work: RecoveryWork, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Write the adapter to the existing ``folder``, and return what its manifest says of it. Raises JobErrors as
    ``load`` does, Unsupported without a quantized layer or a text to read, and OSError."""
    source = load(work.source, dtype=work.dtype, device="cpu", trusted=work.trusted)
    quantized = work.load()
    differences = WeightDifferences(source.model, quantized.model)
    if not differences.layers:
        raise Unsupported(f"no layer of {type(quantized.model).__name__} is quantized, so there is nothing to recover")
    plain, weighted = _Squares(), _Squares()
    factors: dict[str, LowRankFactors] = {}
    stored = getattr(torch, work.dtype.value)
    for moments in _moments(work, differences):
        for name, of_layer in moments.items():
            if not len(factors) % _LAYERS_BETWEEN_REPORTS:
                report(f"recovering, layer {len(factors) + 1} of {len(differences.layers)}")
            error = differences.of(name, exact_dtype(work.device))
            factors[name] = as_stored(low_rank_factors(error, work.recovery.rank, of_layer), stored)
            left = error - _product(factors[name], error)
            plain.add(error.square().sum(), left.square().sum())
            if of_layer is not None:
                weighted.add(_output_squares(error, of_layer), _output_squares(left, of_layer))
    write_adapter(
        folder, factors, model=quantized.model, kind=quantized.kind, base=work.base.name, rank=work.recovery.rank
    )
    return {
        "recovered_layers": len(factors),
        "weight_error_left": plain.share,
        **({"output_error_left": weighted.share} if weighted.taken else {}),
    }


def _moments(work: RecoveryWork, differences: WeightDifferences) -> Iterator[Moments]:
    if work.text is None:
        yield dict.fromkeys(differences.layers)
        return
    # Another copy runs: the codes of the first are still to be read.
    running = work.load()
    layers = {name: module for name, module in running.model.named_modules() if name in differences.layers}
    yield from input_moments(
        running.model,
        layers,
        _probes(work, running),
        work.device,
        most_bytes=free_bytes(work.device) // _MOMENTS_SHARE,
    )


def _probes(work: RecoveryWork, loaded: LoadedModel) -> Sequence[Probe]:
    recovery = work.recovery
    protocol = SearchProtocol(
        text_sha256=recovery.text_sha256 or "", window=recovery.window or 1, windows=recovery.windows or 1
    )
    probes = search_probes(loaded, protocol, work.text or "")
    if not probes:
        raise Unsupported(
            f"{recovery.kind} reads a text, which {type(loaded.model).__name__} cannot: "
            f"{loaded.why_no_tokenizer or 'it takes no text'}"
        )
    return probes


def _product(factors: LowRankFactors, like: torch.Tensor) -> torch.Tensor:
    return factors.up.to(like.device, like.dtype) @ factors.down.to(like.device, like.dtype)


def _output_squares(error: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """The mean square of ``error``·x over the inputs x."""
    return ((error @ moments) * error).sum()
