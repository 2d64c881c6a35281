"""Token ids to measure with: prompts, and the text that is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from models_db.errors import BenchmarkError
from worker.load import Loaded

_RANDOM_TOKENS = 4096
_SEED = 0
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Affixes:
    """What the tokenizer puts around a text by itself: BOS or [CLS] before it, EOS or [SEP] after it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def affixes(tokenizer: Any) -> Affixes:
    """The special tokens that ``tokenizer`` (None for none) adds around a single text."""
    if tokenizer is None:
        return Affixes(before=(), after=())
    plain = tokenizer("text", add_special_tokens=False)["input_ids"]
    whole = tokenizer("text")["input_ids"]
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return Affixes(before=tuple(whole[:begin]), after=tuple(whole[begin + len(plain) :]))
    return Affixes(before=(), after=())


def text_ids(loaded: Loaded, text: str) -> list[int]:
    """The ids of ``text`` without special tokens; without a tokenizer, random ids of a fixed seed.

    Raises BenchmarkError where an id has no row in the model's embeddings: on a GPU that would be a device fault.
    """
    rows = _vocabulary(loaded.model)
    if loaded.tokenizer is None:
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randint(rows, (_RANDOM_TOKENS,), generator=generator).tolist()
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise BenchmarkError("the evaluation text has no tokens")
    if max(ids) >= rows:
        raise BenchmarkError(f"the tokenizer yields id {max(ids)}, but the model embeds only {rows}")
    return ids


def prompts(loaded: Loaded, text: str, *, batch_size: int, length: int) -> torch.Tensor:
    """Ids [batch_size, length] on the model's device: consecutive pieces of ``text``, repeated where it ends."""
    around = affixes(loaded.tokenizer)
    inner = length - len(around.before) - len(around.after)
    if inner < 1:
        around, inner = Affixes(before=(), after=()), length
    ids = text_ids(loaded, text)
    rows = [
        [*around.before, *(ids[(row * inner + column) % len(ids)] for column in range(inner)), *around.after]
        for row in range(batch_size)
    ]
    return torch.tensor(rows, dtype=torch.long, device=loaded.device)


def max_positions(model: Any) -> int | None:
    """The longest input that the model has positions for; None where there is no such limit (ALiBi, relative)."""
    config = model.config.get_text_config()
    limit = next((value for name in _POSITION_FIELDS if isinstance(value := getattr(config, name, None), int)), None)
    return None if limit is None or limit < 1 else limit - _reserved_positions(model)


def _reserved_positions(model: Any) -> int:
    """RoBERTa's family counts positions from ``padding_idx + 1`` on and never uses the ones before."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
