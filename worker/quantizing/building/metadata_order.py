"""One order for a safetensors file's metadata. safetensors writes it in the order of a hash map, which differs at every
run, so that the same checkpoint would have other checksums each time."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def settle_metadata(path: Path) -> None:
    """Put the metadata in ``path`` in the order of its keys. No byte moves but those of the metadata itself.

    Raises OSError; ValueError where the header would have another length, which other texts of the same values may.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{path.name}: a header of {length} bytes became one of {len(text)}")
        file.seek(8)
        file.write(text.ljust(length))
