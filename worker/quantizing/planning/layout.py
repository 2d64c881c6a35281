"""The position of each tensor in a safetensors file, identical to what the safetensors library would write."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from qbatch.core.safetensors_size import HEADER_ALIGNMENT
from qbatch.worker.quantizing.planning.saving import Output

# The metadata that save_pretrained writes; transformers refuses files without it.
_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """One file of ``size`` bytes. ``head`` is the length prefix and the JSON header; ``starts`` maps each tensor's name
    to the offset of its first byte in the file."""

    name: str
    head: bytes
    outputs: tuple[Output, ...]
    starts: Mapping[str, int]
    size: int


def lay_out(file_name: str, outputs: Sequence[Output]) -> FileLayout:
    """Place ``outputs`` in one file, in the safetensors library's own order."""
    by_name = {output.name: output for output in outputs}
    header: dict[str, Any] = {"__metadata__": _METADATA}
    position = 0
    for name, dtype in _order(outputs):
        output = by_name[name]
        end = position + output.nbytes
        header[name] = {"dtype": dtype, "shape": list(output.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    starts = {name: len(head) + entry["data_offsets"][0] for name, entry in header.items() if name in by_name}
    return FileLayout(name=file_name, head=head, outputs=tuple(outputs), starts=starts, size=len(head) + position)


def _order(outputs: Sequence[Output]) -> list[tuple[str, str]]:
    """Tensor names in file order, each with the name that safetensors gives its dtype. The order is determined by
    letting the library serialize empty tensors of the same names and dtypes."""
    empty = {output.name: torch.empty(0, dtype=output.dtype) for output in outputs}
    raw = safetensors.torch.save(empty, metadata=_METADATA)
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    return [(name, entry["dtype"]) for name, entry in entries.items() if name != "__metadata__"]
