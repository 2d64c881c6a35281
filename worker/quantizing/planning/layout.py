"""Where each tensor lies in a safetensors file, exactly as the safetensors library would put it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from qbatch.worker.quantizing.planning.saving import Output

# What save_pretrained writes; transformers refuses files without it.
_METADATA = {"format": "pt"}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """One file: ``head`` is its length prefix and header; ``starts`` gives each tensor's first byte by name."""

    name: str
    head: bytes
    outputs: tuple[Output, ...]
    starts: Mapping[str, int]
    size: int


def lay_out(file_name: str, outputs: Sequence[Output]) -> FileLayout:
    """Place ``outputs`` in one file. The order is the library's own, asked of it with tensors of no size."""
    by_name = {output.name: output for output in outputs}
    header: dict[str, Any] = {"__metadata__": _METADATA}
    position = 0
    for name, dtype in _order(outputs):
        output = by_name[name]
        end = position + output.nbytes
        header[name] = {"dtype": dtype, "shape": list(output.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    starts = {name: len(head) + entry["data_offsets"][0] for name, entry in header.items() if name in by_name}
    return FileLayout(name=file_name, head=head, outputs=tuple(outputs), starts=starts, size=len(head) + position)


def _order(outputs: Sequence[Output]) -> list[tuple[str, str]]:
    """Names in file order, with safetensors' names of their dtypes."""
    empty = {output.name: torch.empty(0, dtype=output.dtype) for output in outputs}
    raw = safetensors.torch.save(empty, metadata=_METADATA)
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    return [(name, entry["dtype"]) for name, entry in entries.items() if name != "__metadata__"]
