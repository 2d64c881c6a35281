"""A model's predictions in few bytes: what goes into its output head, when the head gives the same bits again."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from qbatch.core.errors import BenchmarkError
from qbatch.worker.measuring.quality.probes import Probe
from qbatch.worker.measuring.quality.similarity import embedding

# transformers' name for labels of which any number may hold at once.
_INDEPENDENT_LABELS = "multi_label_classification"


def head_of(model: Any) -> torch.nn.Module | None:
    """The module that turns hidden states into logits; None where the model has none."""
    head = model.get_output_embeddings()
    return head if isinstance(head, torch.nn.Module) else None


def head_sha256(model: Any) -> str | None:
    """Of the head's parameters, byte by byte with their dtypes; None without a head."""
    head = head_of(model)
    if head is None:
        return None
    digest = hashlib.sha256()
    for name, parameter in head.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


@torch.inference_mode()
def logits_of(model: Any, probe: Probe, device: str) -> torch.Tensor:
    """Logits [rows, vocabulary] at the rows that ``probe`` compares; of a classifier [1, labels], or [labels, 2]
    where each label holds or not by itself."""
    return chosen(_forward(model, probe, device), probe)


@torch.inference_mode()
def embedding_of(model: Any, probe: Probe, device: str) -> torch.Tensor:
    """The mean state of ``probe``'s tokens, of the body alone: a head for answers or choices has none for each token.

    Raises BenchmarkError where the body has none either.
    """
    states = model.base_model(**probe.inputs(model, device))[0]
    if states.dim() != 3:
        raise BenchmarkError(f"{type(model).__name__} has no state for each token")
    return embedding(states).cpu()


@torch.inference_mode()
def hidden_and_logits(model: Any, probe: Probe, device: str) -> tuple[torch.Tensor | None, torch.Tensor]:
    """As ``logits_of``, with the head's whole input [1, tokens, width]; None where replaying that would not give
    the very same bits (a model that caps or scales its logits, for one)."""
    head = head_of(model)
    if head is None:
        return None, logits_of(model, probe, device)
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        logits = _forward(model, probe, device)
    finally:
        hook.remove()
    exact = len(seen) == 1 and torch.equal(head(seen[0]), logits)
    return (seen[0] if exact else None), chosen(logits, probe)


@torch.inference_mode()
def replayed(model: Any, hidden: torch.Tensor, probe: Probe) -> torch.Tensor:
    """The logits that ``hidden`` had, from the head of ``model``: the whole input at once, since another number of
    rows may take another kernel and round differently."""
    head = head_of(model)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head")
    logits: torch.Tensor = head(hidden)
    return chosen(logits, probe)


def _forward(model: Any, probe: Probe, device: str) -> torch.Tensor:
    logits: torch.Tensor = model(**probe.inputs(model, device)).logits
    if logits.dim() == 2 and model.config.problem_type == _INDEPENDENT_LABELS:
        # Two rivals to a label, with the probabilities sigmoid(x) and 1 - sigmoid(x).
        return torch.stack((logits[0], torch.zeros_like(logits[0])), dim=-1)
    return logits


def chosen(logits: torch.Tensor, probe: Probe) -> torch.Tensor:
    """The compared rows of logits [1, tokens, vocabulary], or of a classifier's, which are rows as they are."""
    rows = logits[0] if logits.dim() == 3 else logits
    return rows if probe.rows is None else rows[list(probe.rows)]
