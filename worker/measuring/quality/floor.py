"""How far 16-bit arithmetic alone changes a model's predictions: smaller differences are noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qbatch.core.errors import CudaOom, HostOom
from qbatch.core.measured.quality_figures import Quality, QualityFloor
from qbatch.worker.machine.device_faults import device_fault
from qbatch.worker.machine.host_memory import available_memory
from qbatch.worker.measuring.quality.divergence import divergence, summarize_divergence
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.quality.replay import embedding_of, logits_of
from qbatch.worker.measuring.quality.similarity import compare_embeddings
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel

# The number of windows of a text, and of the short pieces that encoders read.
_WINDOWS, _PIECES = 2, 16
# Host memory needed: the float32 copy and, on top, activations and logits, which grow with the model, and the rest.
_MEMORY_FACTOR = 1.25
_EXTRA_BYTES = 1 << 29


def arithmetic_floor(loaded: LoadedModel, probes: Sequence[Probe]) -> QualityFloor | None:
    """How far the unquantized model in ``loaded`` differs from the same model computed in float32, on the first probes.

    Weights and text are the same, so every difference is due to rounding. None if the model is in float32 already, or
    if the memory is too small for the float32 copy.
    """
    if all(parameter.dtype == torch.float32 for parameter in loaded.model.parameters()) or not _fits_in_float32(loaded):
        return None
    compare = _similarity if loaded.kind is ModelKind.ENCODER else _divergence
    try:
        return _floor_of(
            compare(loaded, probes[: _WINDOWS if loaded.kind in (ModelKind.CAUSAL_LM, ModelKind.SEQ2SEQ) else _PIECES])
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
    rounded = [logits_of(loaded.model, probe, loaded.device) for probe in probes]
    with _in_float32(loaded.model):
        divergences = [
            divergence(logits_of(loaded.model, probe, loaded.device), logits, probe.targets)
            for probe, logits in zip(probes, rounded, strict=True)
        ]
    return summarize_divergence(divergences)


def _similarity(loaded: LoadedModel, probes: Sequence[Probe]) -> Quality:
    rounded = _embeddings(loaded, probes)
    with _in_float32(loaded.model):
        exact = _embeddings(loaded, probes)
    return compare_embeddings(exact, rounded)


def _embeddings(loaded: LoadedModel, probes: Sequence[Probe]) -> torch.Tensor:
    return torch.stack([embedding_of(loaded.model, probe, loaded.device) for probe in probes])


def _fits_in_float32(loaded: LoadedModel) -> bool:
    """Whether there is enough memory, as far as it can be known beforehand.

    A GPU raises an error when its memory is full. On a CPU the kernel would kill the process, so this must be
    estimated.
    """
    if loaded.device.startswith("cuda"):
        return True
    float32_bytes = sum(4 * tensor.numel() for tensor in _floats(loaded.model) if tensor.dtype != torch.float32)
    return available_memory() >= _MEMORY_FACTOR * float32_bytes + _EXTRA_BYTES


def _floats(model: Any) -> list[torch.Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Convert weights and buffers to float32 within the context, and back to the same bits afterwards.

    That is lossless, since float32 represents every 16-bit float exactly.
    """
    # The largest first, while most memory is free. Back with the smallest first: each frees more than its copy takes.
    tensors = sorted(_floats(model), key=torch.numel, reverse=True)
    before = [tensor.dtype for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in reversed(list(zip(tensors, before, strict=True))):
            tensor.data = tensor.data.to(dtype)
