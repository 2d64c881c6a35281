"""Reproduces the recipe's table with qbatch: the full architecture of bigscience/bloom-1b7, with 8 and 4 bits.

The weights are random, so sizes are those of the real model, but its text is not. Exits with 1 unless the number of
parameters and the file sizes match the recipe's. Needs 11 GB of disk space and 10 GB of memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

SEED = 17
PLACE = Path("build/seed-table")
SHARD_BYTES = 5_000_000_000  # the original's two files: 4714 MiB and 1857 MiB
MIB = 2**20
TOLERANCE_MIB = 1.0
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
EVAL_TEXT = "Random weights have nothing to say, so a short text is enough to ask them about. " * 8
COLUMNS = (
    ("bits", "bits", "{}"),
    ("dtype", "dtype", "{}"),
    ("parameters", "num_parameters", "{}"),
    ("memory MiB", "memory_footprint_bytes", "{:.2f}"),
    ("disk MiB", "disk_bytes", "{:.1f}"),
    ("prefill s", "prefill_s_p50", "{:.3f}"),
    ("s/token", "per_token_s_p50", "{:.3f}"),
    ("device", "device_name", "{}"),
)


def make_source(folder: Path) -> None:
    """Create the model with random weights in ``folder``, atomically. An existing one is kept."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = BloomConfig(
        vocab_size=250880, hidden_size=2048, n_layer=24, n_head=16, pad_token_id=3, architectures=["BloomForCausalLM"]
    )
    config.dtype = torch.float32
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as staging:
        made = Path(staging) / folder.name
        config.save_pretrained(made)
        _byte_tokenizer().save_pretrained(made)
        _write_weights(made, _shapes(config))
        made.rename(folder)


def _shapes(config: BloomConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = BloomForCausalLM(config).state_dict()
    del state["lm_head.weight"]  # tied to the embeddings
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    names = [*SPECIAL_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: token for token, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def _write_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    pool = np.random.default_rng(SEED).standard_normal(largest, dtype=np.float32) * np.float32(0.02)
    shards = list(_shards(shapes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _values(pool, number, name, shapes[name]) for name in names}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = 4 * int(np.prod(shape))
        if names and size + nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _values(pool: Any, seed: int, name: str, shape: tuple[int, ...]) -> Any:
    """The values of one tensor, float32 ``shape``: a slice of the pool at a position that depends on the name. As in a
    new model, norms are 1 and biases 0."""
    if len(shape) == 1:
        return np.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=np.float32)
    count = int(np.prod(shape))
    start = int(np.random.default_rng([seed, *name.encode()]).integers(0, pool.size - count + 1))
    return pool[start : start + count].reshape(shape)


def qbatch(*arguments: str) -> Any:
    """Run the installed command and parse its JSON. Its progress is printed to the terminal. Exits if it fails."""
    command = [str(Path(sys.executable).with_name("qbatch")), *arguments, "--format", "json"]
    environ = os.environ | {"QBATCH_HOME": str((PLACE / "home").absolute())}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}")
    return json.loads(done.stdout)


def measure(source: Path) -> list[dict[str, Any]]:
    """The rows of the table: unquantized in float32, then with 8 and 4 bits and 16-bit embeddings."""
    models_file, text_file = PLACE / "models.txt", PLACE / "eval.txt"
    models_file.write_text(f"{source.absolute()}\n")
    text_file.write_text(EVAL_TEXT)
    common = ("run", "--models", str(models_file), "--eval-text", str(text_file))
    rows = qbatch(*common, "--bits", "16", "--dtype", "float32")
    rows += qbatch(*common, "--bits", "8,4", "--no-baseline")
    return sorted(rows, key=lambda row: -int(row["bits"]))


def print_table(rows: list[dict[str, Any]]) -> None:
    cells = [[title for title, _, _ in COLUMNS]]
    cells += [[_cell(row[key], key, form) for _, key, form in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _cell(value: Any, key: str, form: str) -> str:
    if value is None:
        return "-"
    return form.format(value / MIB if key.endswith("_bytes") else value)


def misses(inspected: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """The differences from the recipe's figures, one line each."""
    of = {row["bits"]: row for row in rows}
    expected = (
        ("parameters by the headers", inspected["num_parameters"], 1722408960, 0.0),
        ("MiB at fp32 by the headers", inspected["memory_bytes"] / MIB, 6570.47, 0.01),
        ("parameters at 32 bits", of[32]["num_parameters"], 1722408960, 0.0),
        ("parameters at 8 bits", of[8]["num_parameters"], 1722408960, 0.0),
        ("parameters at 4 bits", of[4]["num_parameters"], 1722408960, 0.0),
        ("MiB at fp32 in memory", of[32]["memory_footprint_bytes"] / MIB, 6570.47, 0.01),
        ("MiB of files at 8 bits", of[8]["disk_bytes"] / MIB, 2135.0, TOLERANCE_MIB),
        ("MiB of files at 4 bits", of[4]["disk_bytes"] / MIB, 1630.0, TOLERANCE_MIB),
    )
    return [
        f"{what}: {measured} instead of {wanted}"
        for what, measured, wanted, tolerance in expected
        if abs(measured - wanted) > tolerance
    ]


def main() -> None:
    source = PLACE / "bloom-1b7-random"
    make_source(source)
    inspected = qbatch("inspect", str(source.absolute()))[0]
    rows = measure(source)
    print_table(rows)
    problems = misses(inspected, rows)
    if problems:
        sys.exit("these figures differ from the recipe's:\n  " + "\n  ".join(problems))
    print("all figures match the recipe's")


if __name__ == "__main__":
    main()
