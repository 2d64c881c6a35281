"""Store predictions in few bytes: as the inputs of the output head, if it gives the same logits again to the bit."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from qbatch.core.byte_units import MIB
from qbatch.core.digest import CHUNK_BYTES
from qbatch.core.errors import BenchmarkError
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.quality.similarity import embedding

_PIECE_BYTES = 4 * MIB

# transformers' name for independent labels, of which any number may apply at once.
_INDEPENDENT_LABELS = "multi_label_classification"


def head_of(model: Any) -> torch.nn.Module | None:
    """The module that turns hidden states into logits; None if the model has none."""
    head = model.get_output_embeddings()
    return head if isinstance(head, torch.nn.Module) else None


def head_sha256(model: Any) -> str | None:
    """The hash of the output head's parameters: bytes, dtypes and shapes. None without a head."""
    head = head_of(model)
    if head is None:
        return None
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for name, parameter in head.named_parameters():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            values = parameter.detach().contiguous().view(torch.uint8).flatten()
            # In chunks that are hashed side by side: a head of a gigabyte takes one thread up to two seconds.
            for hashed in pool.map(_sha256, torch.split(values, CHUNK_BYTES)):
                digest.update(hashed)
    return digest.hexdigest()


def _sha256(values: torch.Tensor) -> bytes:
    """The hash of bytes, in pieces that the processor's cache holds. From a GPU each piece is copied into the same few
    megabytes: to put new memory under a whole head takes longer than to copy and to hash it."""
    digest = hashlib.sha256()
    buffer = None if values.device.type == "cpu" else torch.empty(min(_PIECE_BYTES, len(values)), dtype=torch.uint8)
    for piece in torch.split(values, _PIECE_BYTES):
        on_host = piece if buffer is None else buffer[: len(piece)].copy_(piece)
        digest.update(on_host.numpy().data)
    return digest.digest()


@torch.inference_mode()
def logits_of(model: Any, probe: Probe, device: str) -> torch.Tensor:
    """Logits [rows, vocabulary] at the rows that ``probe`` compares.

    For a classifier [1, labels], or [labels, 2] if its labels are independent.
    """
    return forward_logits(model, probe, device)


def forward_logits(model: Any, probe: Probe, device: str) -> torch.Tensor:
    """``logits_of`` in the caller's mode: with a graph for a backward pass, unless that is turned off."""
    return compared_rows(_forward(model, probe, device), probe)


@torch.inference_mode()
def embedding_of(model: Any, probe: Probe, device: str) -> torch.Tensor:
    """The mean of the body's last hidden states over ``probe``'s tokens, float32 [width] on the CPU.

    Heads for question answering or multiple choice are left out, since they output no state for each token. Raises
    BenchmarkError if the body does not either.
    """
    states = model.base_model(**probe.inputs(model, device))[0]
    if states.dim() != 3:
        raise BenchmarkError(f"{type(model).__name__} outputs no hidden state for each token")
    return embedding(states).cpu()


@torch.inference_mode()
def hidden_and_logits(model: Any, probe: Probe, device: str) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(the head's whole input [1, tokens, width], logits as of ``logits_of``).

    The input is None if the head does not give the same logits from it again, to the bit: for example, in a model that
    caps or scales its logits.
    """
    head = head_of(model)
    if head is None:
        return None, logits_of(model, probe, device)
    inputs: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        logits = _forward(model, probe, device)
    finally:
        hook.remove()
    is_exact = len(inputs) == 1 and torch.equal(head(inputs[0]), logits)
    return (inputs[0] if is_exact else None), compared_rows(logits, probe)


@torch.inference_mode()
def replayed_logits(model: Any, hidden: torch.Tensor, probe: Probe) -> torch.Tensor:
    """The logits that the head of ``model`` computes from ``hidden``, the whole input at once.

    With another number of rows, another kernel might run and round differently.
    """
    head = head_of(model)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head")
    logits: torch.Tensor = head(hidden)
    return compared_rows(logits, probe)


def _forward(model: Any, probe: Probe, device: str) -> torch.Tensor:
    logits: torch.Tensor = model(**probe.inputs(model, device)).logits
    if logits.dim() == 2 and model.config.problem_type == _INDEPENDENT_LABELS:
        # Two classes for each label, with the probabilities sigmoid(x) and 1 - sigmoid(x).
        return torch.stack((logits[0], torch.zeros_like(logits[0])), dim=-1)
    return logits


def compared_rows(logits: torch.Tensor, probe: Probe) -> torch.Tensor:
    """The rows that ``probe`` compares, of logits [1, tokens, vocabulary] or a classifier's [rows, labels]."""
    rows = logits[0] if logits.dim() == 3 else logits
    return rows if probe.rows is None else rows[list(probe.rows)]
