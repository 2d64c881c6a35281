"""Whether a config asks for more than its weights hold: before transformers builds it, which would have no end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qbatch.core.errors import SourceCorrupt
from qbatch.core.sources import Header

# What a module is built for each of: every one has a tensor of its own, or shares that of a few hundred at most.
_LAYERS = re.compile(
    r"(\w*_)?(layers?|depths?|blocks|block_sizes|repeats|hidden_groups|stages|levels|codebooks|quantizers|towers|modules)"
)
# These may lie side by side in one tensor.
_EXPERTS = re.compile(r"(\w*_)?(experts|heads|groups|adapters|loras)")
# What a table or a mask is built over. Rotary positions are in no tensor.
_POSITIONS = re.compile(r"(\w*_)?(positions?|position_embeddings|seq_?len(gth)?|context_length|n_ctx)")
# What is a tensor's dimension.
_SIZES = re.compile(r"(\w*_)?(size|dims?|d_model|d_ff|d_kv|embd|inner|channels|rank|width|features|units|buckets)")
_POSITION_TABLE = re.compile(r"(.*\.)?(wpe|\w*position_embeddings?|\w*embed_positions|\w*pos_embed(ding)?)(\.weight)?")

# Below these nothing is refused: no model has more without having the tensors, and what is built of them is small.
_FEW_LAYERS = 256
_FEW_EXPERTS = 2048
_FEW_POSITIONS = 2**25
_FEW_TABLED_POSITIONS = 2**16
_SMALL_SIZE = 2**24


def refuse_disproportion(config: Mapping[str, Any], headers: Sequence[Header]) -> None:
    """Raise SourceCorrupt where config.json, or a config within it, asks for what the weights cannot fill."""
    tensors = [tensor for header in headers for tensor in header.tensors]
    largest = max((size for tensor in tensors for size in tensor.shape), default=0)
    tables = [max(t.shape, default=0) for t in tensors if len(t.shape) > 1 and _POSITION_TABLE.fullmatch(t.name)]
    # With several models in one, the table may be another one's than the positions.
    is_tabled = bool(tables) and not any(isinstance(value, Mapping) for value in config.values())
    positions = max(_FEW_TABLED_POSITIONS if is_tabled else _FEW_POSITIONS, 2 * max(tables, default=0))
    rules = (
        (_LAYERS, max(_FEW_LAYERS, len(tensors))),
        (_EXPERTS, max(_FEW_EXPERTS, len(tensors), largest)),
        (_POSITIONS, positions),
        (_SIZES, max(_SMALL_SIZE, largest)),
    )
    for key, value in _numbers(config):
        most = next((most for names, most in rules if names.fullmatch(key)), None)
        if most is not None and value > most:
            raise SourceCorrupt(
                f"config.json asks for {value:g} of {key}, and the weights are {len(tensors)} tensors with at most "
                f"{largest} rows or columns"
            )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Every number with the key that it stands under, in lists and configs within too."""
    left: list[tuple[str, Any]] = list(config.items())
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield str(key).lower(), value
