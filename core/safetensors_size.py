"""How large safetensors files are, from the names, dtypes and shapes of their tensors. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from qbatch.core.methods.description import StoredParts
from qbatch.core.sources import bits_of

HEADER_ALIGNMENT = 8
"""A header is padded to a multiple of so many bytes."""
_PREFIX_BYTES = 8
# transformers' own.
_LARGEST_FILE_BYTES = 50 * 10**9
# The library writes tensors of the last of these first.
_ORDER = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)
_DIGITS = re.compile(r"([0-9]+)$")


def files_bytes(tensors: StoredParts, metadata: Mapping[str, str], largest_file_bytes: int | None) -> int:
    """The bytes of the files that transformers writes for ``tensors``, each at most so large if its tensors allow."""
    files = _divided(tensors, _LARGEST_FILE_BYTES if largest_file_bytes is None else largest_file_bytes)
    return sum(_file_bytes({name: tensors[name] for name in names}, metadata) for names in files)


def _file_bytes(tensors: StoredParts, metadata: Mapping[str, str]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name in sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        end = position + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return _PREFIX_BYTES + length + -length % HEADER_ALIGNMENT + position


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    return prod(shape) * bits_of(dtype) // 8


def _divided(tensors: StoredParts, largest: int) -> Iterator[Sequence[str]]:
    """The names of the tensors of each file, as ``huggingface_hub`` divides them in the order of transformers."""
    names: list[str] = []
    room = largest
    for name in sorted(tensors, key=_natural):
        size = nbytes(*tensors[name])
        if size > largest:
            yield [name]
            continue
        if size > room:
            yield names
            names, room = [], largest
        names.append(name)
        room -= size
    if names:
        yield names


def _natural(name: str) -> list[tuple[int, Any, int]]:
    """Numbers in a name are ordered by their value."""
    return [_part(part) for part in name.split(".")]


def _part(part: str) -> tuple[int, Any, int]:
    if part.isdigit():
        return (0, int(part), -1)
    digits = _DIGITS.search(part)
    return (1, part[: digits.start()] if digits else part, int(digits[1]) if digits else -1)
