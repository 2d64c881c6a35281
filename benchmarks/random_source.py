"""Creates models with random weights at the speed of the disk, without holding a whole model in memory."""

from __future__ import annotations

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

_TILE_BYTES = 64 * 2**20
_THREADS = 8

# name → (architecture, dtype, its config's fields)
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-8b": (
        "LlamaForCausalLM",
        "bfloat16",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "llama-3b": (
        "LlamaForCausalLM",
        "bfloat16",
        {
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "llama-1b": (
        "LlamaForCausalLM",
        "bfloat16",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "bloom-1b7": (
        "BloomForCausalLM",
        "float32",
        {"vocab_size": 250880, "hidden_size": 2048, "n_layer": 24, "n_head": 16},
    ),
    "300m": (
        "LlamaForCausalLM",
        "bfloat16",
        {
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 14,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
    ),
    "tiny": (
        "LlamaForCausalLM",
        "bfloat16",
        {
            "vocab_size": 2048,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
}


def build_source(shape: str, folder: Path, seed: int = 0) -> int:
    """Write random weights of ``shape``. Returns the size of the weight file in bytes."""
    import numpy as np
    import torch
    import transformers

    class_name, dtype, fields = SHAPES[shape]
    cls = getattr(transformers, class_name)
    config = cls.config_class(**fields, dtype=dtype, architectures=[class_name])
    with torch.device("meta"):
        model = cls(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    skipped = set(getattr(model, "all_tied_weights_keys", {}) or {})
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name not in skipped}
    itemsize, code = (2, "BF16") if dtype == "bfloat16" else (4, "F32")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in sorted(shapes):
        end = position + itemsize * prod(shapes[name])
        header[name] = {"dtype": code, "shape": shapes[name], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    values = np.random.default_rng(seed).standard_normal(_TILE_BYTES // itemsize, dtype=np.float32) * 0.02
    tile = values.tobytes() if itemsize == 4 else (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    _write_tiles(folder / "model.safetensors", head, tile, position)
    return len(head) + position


def build_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are the 256 bytes, for models without one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _write_tiles(path: Path, head: bytes, tile: bytes, data_bytes: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    os.pwrite(descriptor, head, 0)
    view = memoryview(tile)
    starts = range(0, data_bytes, len(tile))
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda start: pwrite_all(descriptor, view[: data_bytes - start], len(head) + start), starts))
    os.close(descriptor)


def pwrite_all(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of ``data`` at byte ``position``, with as many calls as needed."""
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written
