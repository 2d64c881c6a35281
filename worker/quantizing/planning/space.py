"""The disk space that a checkpoint needs, computed before any data is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qbatch.worker.methods.packing import Packing


def weights_bytes(model: Any, packing: Packing, quantized: Mapping[str, Sequence[int]]) -> int:
    """The size of all tensors in ``model``'s checkpoint, accurate to some hundred bytes per weight. ``quantized`` maps
    the name of each quantized parameter to its shape [rows, columns]."""
    parts = [part for shape in quantized.values() for part in packing.part_shapes(*shape).values()]
    others = sum(parameter.nbytes for name, parameter in model.named_parameters() if name not in quantized)
    packed: int = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in parts)
    return int(others) + packed


def allocated_bytes(paths: Iterable[Path]) -> int:
    """The disk space allocated to the files so far. File systems without preallocation allocate it during writing."""
    return sum(path.stat().st_blocks * 512 for path in paths)
