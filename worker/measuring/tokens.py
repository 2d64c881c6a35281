"""Token ids for measurements: prompts, and the evaluation text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qbatch.core.domain import Protocol
from qbatch.core.errors import BenchmarkError
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel

_RANDOM_TOKENS = 4096
_SEED = 0
# Encoders read the text in short pieces, because similarities need many pairs, and labels many inputs.
_PIECE_TOKENS = 64
_MAX_PIECES = 64
_CHARACTERS_PER_TOKEN = 8
_MARGIN = 64
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Affixes:
    """The special tokens that a tokenizer adds: BOS or [CLS] before a text, EOS or [SEP] after it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def affixes(tokenizer: Any) -> Affixes:
    """The special tokens that ``tokenizer`` adds around a single text. Empty if ``tokenizer`` is None."""
    if tokenizer is None:
        return Affixes(before=(), after=())
    plain = tokenizer("text", add_special_tokens=False)["input_ids"]
    whole = tokenizer("text")["input_ids"]
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return Affixes(before=tuple(whole[:begin]), after=tuple(whole[begin + len(plain) :]))
    return Affixes(before=(), after=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a text is cut for a model: into at most ``count`` pieces that begin ``stride`` tokens apart.

    A piece has ``window`` tokens, including the special ones around it.
    """

    window: int
    stride: int
    count: int

    @property
    def tokens(self) -> int:
        """The number of tokens of the text that are used."""
        return (self.count - 1) * self.stride + self.window


def text_cut(loaded: LoadedModel, protocol: Protocol) -> Cut:
    """How the text of ``protocol`` is cut, with windows no longer than the model's maximum length."""
    limit, around = max_positions(loaded.model), affixes(loaded.tokenizer)
    window = protocol.eval_window if limit is None else min(protocol.eval_window, limit)
    if loaded.kind is ModelKind.CAUSAL_LM:
        stride = min(protocol.eval_stride, window - len(around.before))
        return Cut(window=window, stride=stride, count=protocol.eval_max_windows)
    count = protocol.eval_max_windows
    if loaded.kind is not ModelKind.SEQ2SEQ:
        window, count = min(_PIECE_TOKENS, window), _MAX_PIECES
    return Cut(window=window, stride=max(1, window - len(around.before) - len(around.after)), count=count)


def text_ids(loaded: LoadedModel, text: str, most: int) -> list[int]:
    """The ids of the first ``most`` tokens of ``text``, or of all if it has fewer, without special tokens.

    Without a tokenizer, random ids from a fixed seed. Raises BenchmarkError if the text has no tokens, or if an id has
    no row in the model's embeddings, which would be a device fault on a GPU.
    """
    rows = _vocabulary(loaded.model)
    if loaded.tokenizer is None:
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randint(rows, (_RANDOM_TOKENS,), generator=generator).tolist()
    ids = _first_ids(loaded.tokenizer, text, most)
    if not ids:
        raise BenchmarkError("the evaluation text has no tokens")
    if max(ids) >= rows:
        raise BenchmarkError(f"the tokenizer yields id {max(ids)}, but the model embeds only {rows}")
    return ids


def _first_ids(tokenizer: Any, text: str, most: int) -> list[int]:
    """Tokenize no more of ``text`` than needed: 10 MB would take ten seconds and over a gigabyte of memory."""
    characters = _CHARACTERS_PER_TOKEN * (most + _MARGIN)
    while True:
        ids: list[int] = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        # The cut may have changed the last tokens, so a margin is dropped.
        if characters >= len(text) or len(ids) >= most + _MARGIN:
            return ids[:most]
        characters *= 2


def prompts(loaded: LoadedModel, text: str, *, batch_size: int, length: int) -> torch.Tensor:
    """Ids [batch_size, length] on the model's device: consecutive pieces of ``text``, repeated if it is too short."""
    around = affixes(loaded.tokenizer)
    inner = length - len(around.before) - len(around.after)
    if inner < 1:
        around, inner = Affixes(before=(), after=()), length
    ids = text_ids(loaded, text, batch_size * inner)
    rows = [
        [*around.before, *(ids[(row * inner + column) % len(ids)] for column in range(inner)), *around.after]
        for row in range(batch_size)
    ]
    return torch.tensor(rows, dtype=torch.long, device=loaded.device)


def max_positions(model: Any) -> int | None:
    """The longest input in tokens that the model has positions for; None without such a limit (ALiBi, relative)."""
    config = model.config.get_text_config()
    limit = next((value for name in _POSITION_FIELDS if isinstance(value := getattr(config, name, None), int)), None)
    return None if limit is None or limit < 1 else limit - _reserved_positions(model)


def _reserved_positions(model: Any) -> int:
    """The number of positions never used: RoBERTa and its relatives count from ``padding_idx + 1``."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
