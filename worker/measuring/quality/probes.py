"""The fixed inputs on which a quantized model is compared with its base, by the kind of model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qbatch.core.domain import Protocol
from qbatch.worker.measuring.quality.perplexity import text_windows
from qbatch.worker.measuring.tokens import affixes, text_cut, text_ids
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel

# Every seventh token is masked: 14 %, near the 15 % that such models are trained with.
_MASK_EVERY = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One input.

    ``rows``: the output positions that are compared, None for all. ``targets``: the correct token at each of them.
    ``labels``: the tokens that the decoder of an encoder-decoder is given to predict.
    """

    ids: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    targets: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()

    def inputs(self, model: Any, device: str) -> dict[str, Any]:
        """Arguments of a forward pass with a batch of one."""
        ids = torch.tensor([self.ids], device=device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.can_generate():
            inputs["use_cache"] = False
        if self.labels:
            inputs["labels"] = torch.tensor([self.labels], device=device)
        elif model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        return inputs


def probes_of(loaded: LoadedModel, protocol: Protocol, text: str) -> list[Probe]:
    """The probes of ``text`` for the kind of ``loaded``. Empty without a tokenizer or, if needed, a mask token."""
    if loaded.tokenizer is None:
        return []
    if loaded.kind is ModelKind.CAUSAL_LM:
        return [_causal(window.ids, window.scored) for window in text_windows(loaded, protocol, text)]
    pieces = _pieces(loaded, protocol, text)
    if loaded.kind is ModelKind.SEQ2SEQ:
        return [_halves(loaded, piece) for piece in pieces if len(piece) >= 2]
    if loaded.kind is ModelKind.MASKED_LM:
        mask = loaded.tokenizer.mask_token_id
        return [] if mask is None else [_masked(loaded, piece, mask) for piece in pieces]
    if loaded.kind is ModelKind.TOKEN_CLASSIFICATION:
        # Labels of special tokens are never used.
        first = len(affixes(loaded.tokenizer).before)
        return [Probe(ids=_wrapped(loaded, piece), rows=tuple(range(first, first + len(piece)))) for piece in pieces]
    return [Probe(ids=_wrapped(loaded, piece)) for piece in pieces]


def probes_hash(probes: Sequence[Probe]) -> str:
    """A hash of the token ids and the compared positions."""
    parts = [(probe.ids, probe.rows, probe.targets, probe.labels) for probe in probes]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _causal(ids: tuple[int, ...], scored: int) -> Probe:
    end = len(ids) - 1
    return Probe(ids=ids, rows=tuple(range(end - scored, end)), targets=ids[-scored:])


def _halves(loaded: LoadedModel, piece: tuple[int, ...]) -> Probe:
    middle = len(piece) // 2
    return Probe(ids=_wrapped(loaded, piece[:middle]), targets=piece[middle:], labels=piece[middle:])


def _masked(loaded: LoadedModel, piece: tuple[int, ...], mask: int) -> Probe:
    positions = range(_MASK_EVERY // 2 if len(piece) > _MASK_EVERY // 2 else 0, len(piece), _MASK_EVERY)
    masked = tuple(mask if position in positions else token for position, token in enumerate(piece))
    shift = len(affixes(loaded.tokenizer).before)
    return Probe(
        ids=_wrapped(loaded, masked),
        rows=tuple(position + shift for position in positions),
        targets=tuple(piece[position] for position in positions),
    )


def _pieces(loaded: LoadedModel, protocol: Protocol, text: str) -> Iterator[tuple[int, ...]]:
    """Yield consecutive pieces of the text, without the special tokens around them."""
    cut = text_cut(loaded, protocol)
    ids = text_ids(loaded, text, cut.tokens)
    for begin in range(0, min(len(ids), cut.stride * cut.count), cut.stride):
        yield tuple(ids[begin : begin + cut.stride])


def _wrapped(loaded: LoadedModel, piece: tuple[int, ...]) -> tuple[int, ...]:
    around = affixes(loaded.tokenizer)
    return (*around.before, *piece, *around.after)
