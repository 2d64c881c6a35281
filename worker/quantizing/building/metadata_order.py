"""Sorts the metadata in a safetensors file. safetensors writes it in the order of a hash map, which changes with every
run, so that otherwise the same checkpoint would have different checksums each time."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def sort_metadata(path: Path) -> None:
    """Sort the metadata in ``path`` by key, in place. Tensor data does not move.

    Raises OSError, or ValueError if the header becomes longer, which can happen if it was serialized differently.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{path.name}: sorting the metadata grew the header from {length} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(length))
