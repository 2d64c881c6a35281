"""How far 16-bit arithmetic by itself moves a model's predictions: what is below is noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qbatch.core.errors import CudaOom, HostOom
from qbatch.core.measured.quality_figures import Quality, QualityFloor
from qbatch.worker.machine.device_faults import device_fault
from qbatch.worker.machine.host_memory import available_memory
from qbatch.worker.measuring.quality.divergence import Divergence, divergence, summarize_divergence
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.quality.replay import embedding_of, logits_of
from qbatch.worker.measuring.quality.similarity import compare_embeddings
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel

# As many windows of a text, or of the short pieces that encoders read.
_WINDOWS, _PIECES = 2, 16
# Of a CPU's memory, beside the float32 copy itself: activations and logits, which grow with the model, and the rest.
_ROOM_FACTOR = 1.25
_ROOM_BYTES = 1 << 29


def arithmetic_floor(loaded: LoadedModel, probes: Sequence[Probe]) -> QualityFloor | None:
    """How far the unquantized model in ``loaded`` is from itself computed in float32, on the first probes, in the
    figures that it is compared by.

    The same weights and the same text, so all of it is rounding. None for a model that is float32 already, and
    where the device has no room for the float32 copy.
    """
    if all(parameter.dtype == torch.float32 for parameter in loaded.model.parameters()) or not _has_room(loaded):
        return None
    compare = _similarity if loaded.task is ModelKind.ENCODER else _divergence
    try:
        return _floor_of(
            compare(loaded, probes[: _WINDOWS if loaded.task in (ModelKind.CAUSAL_LM, ModelKind.SEQ2SEQ) else _PIECES])
        )
    except Exception as error:
        if device_fault(error) not in (CudaOom, HostOom):
            raise
        return None


def _floor_of(quality: Quality) -> QualityFloor:
    return QualityFloor(
        windows=quality.windows,
        rows=quality.rows,
        kl_mean=quality.kl_mean,
        kl_median=quality.kl_median,
        kl_p90=quality.kl_p90,
        kl_p95=quality.kl_p95,
        kl_p99=quality.kl_p99,
        kl_max=quality.kl_max,
        top1_agreement=quality.top1_agreement,
        ln_ppl_ratio=quality.ln_ppl_ratio,
        rms_delta_p=quality.rms_delta_p,
        pieces=quality.pieces,
        reason=quality.reason,
        cosine_mean=quality.cosine_mean,
        cosine_min=quality.cosine_min,
        rank_correlation=quality.rank_correlation,
    )


def _divergence(loaded: LoadedModel, probes: Sequence[Probe]) -> Quality:
    rounded = [logits_of(loaded.model, probe, loaded.device).cpu() for probe in probes]
    with _in_float32(loaded.model):
        found = [_from_float32(loaded, probe, logits) for probe, logits in zip(probes, rounded, strict=True)]
    return summarize_divergence(found)


def _similarity(loaded: LoadedModel, probes: Sequence[Probe]) -> Quality:
    rounded = _embeddings(loaded, probes)
    with _in_float32(loaded.model):
        exact = _embeddings(loaded, probes)
    return compare_embeddings(exact, rounded)


def _embeddings(loaded: LoadedModel, probes: Sequence[Probe]) -> torch.Tensor:
    return torch.stack([embedding_of(loaded.model, probe, loaded.device) for probe in probes])


def _has_room(loaded: LoadedModel) -> bool:
    """A GPU says so when its memory is full; of a CPU's the kernel kills whoever takes more than there is."""
    if loaded.device.startswith("cuda"):
        return True
    wide = sum(4 * tensor.numel() for tensor in _floats(loaded.model) if tensor.dtype != torch.float32)
    return available_memory() >= _ROOM_FACTOR * wide + _ROOM_BYTES


def _floats(model: Any) -> list[torch.Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]


def _from_float32(loaded: LoadedModel, probe: Probe, rounded: torch.Tensor) -> Divergence:
    exact = logits_of(loaded.model, probe, loaded.device)
    return divergence(exact, rounded.to(loaded.device), probe.targets)


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Weights in float32 inside; outside as they were, to the bit, since every 16-bit float is a float32."""
    # The largest first, while there is room, and back the smallest first: each gives more than its 16 bits take.
    tensors = sorted(_floats(model), key=torch.numel, reverse=True)
    before = [tensor.dtype for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in reversed(list(zip(tensors, before, strict=True))):
            tensor.data = tensor.data.to(dtype)
