"""Refuses a config that asks for more than its weights contain. This is checked before transformers builds the model,
which might never finish."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qbatch.core.errors import SourceCorrupt
from qbatch.core.sources import Header

# Counts of modules. Each module has a tensor of its own, or shares one with a few hundred others at most.
_LAYERS = re.compile(
    r"(\w*_)?(layers?|depths?|blocks|block_sizes|repeats|hidden_groups|stages|levels|codebooks|quantizers|towers|modules)"
)
# Counts of modules that may be stacked in one tensor.
_EXPERTS = re.compile(r"(\w*_)?(experts|heads|groups|adapters|loras)")
# Lengths of tables and masks. Rotary positions are in no tensor.
_POSITIONS = re.compile(r"(\w*_)?(positions?|position_embeddings|seq_?len(gth)?|context_length|n_ctx)")
# Sizes that are a dimension of some tensor.
_SIZES = re.compile(r"(\w*_)?(size|dims?|d_model|d_ff|d_kv|embd|inner|channels|rank|width|features|units|buckets)")
_POSITION_TABLE = re.compile(r"(.*\.)?(wpe|\w*position_embeddings?|\w*embed_positions|\w*pos_embed(ding)?)(\.weight)?")

# Values up to these are always accepted: no real model has more without having the tensors, and what is built is small.
_FEW_LAYERS = 256
_FEW_EXPERTS = 2048
_FEW_POSITIONS = 2**25
_FEW_TABLED_POSITIONS = 2**16
_SMALL_SIZE = 2**24


def refuse_implausible_config(config: Mapping[str, Any], headers: Sequence[Header]) -> None:
    """Raise SourceCorrupt if config.json, or a config nested in it, asks for more than the weights can fill."""
    tensors = [tensor for header in headers for tensor in header.tensors]
    largest = max((size for tensor in tensors for size in tensor.shape), default=0)
    tables = [max(t.shape, default=0) for t in tensors if len(t.shape) > 1 and _POSITION_TABLE.fullmatch(t.name)]
    # In a composite model, the table and the number of positions may belong to different parts.
    is_tabled = bool(tables) and not any(isinstance(value, Mapping) for value in config.values())
    positions = max(_FEW_TABLED_POSITIONS if is_tabled else _FEW_POSITIONS, 2 * max(tables, default=0))
    rules = (
        (_LAYERS, max(_FEW_LAYERS, len(tensors))),
        (_EXPERTS, max(_FEW_EXPERTS, len(tensors), largest)),
        (_POSITIONS, positions),
        (_SIZES, max(_SMALL_SIZE, largest)),
    )
    for key, value in _numbers(config):
        limit = next((limit for names, limit in rules if names.fullmatch(key)), None)
        if limit is not None and value > limit:
            raise SourceCorrupt(
                f"config.json sets {key} to {value:g}, but the weights are only {len(tensors)} tensors with at most "
                f"{largest} rows or columns"
            )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """All numbers in the config, with their keys in lower case. Includes those in lists and nested configs."""
    remaining: list[tuple[str, Any]] = list(config.items())
    while remaining:
        key, value = remaining.pop()
        if isinstance(value, Mapping):
            remaining += value.items()
        elif isinstance(value, list):
            remaining += [(key, item) for item in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield str(key).lower(), value
