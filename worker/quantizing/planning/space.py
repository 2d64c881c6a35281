"""The room that a checkpoint needs, known before any of its data is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qbatch.worker.methods.packing import Packing


def weights_bytes(model: Any, packing: Packing, quantized: Mapping[str, Sequence[int]]) -> int:
    """What the tensors of ``model``'s checkpoint take, but for some hundred bytes a weight. ``quantized`` are the
    shapes [rows, columns] of the weights that are, by parameter name."""
    parts = [part for shape in quantized.values() for part in packing.part_shapes(*shape).values()]
    others = sum(parameter.nbytes for name, parameter in model.named_parameters() if name not in quantized)
    packed: int = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in parts)
    return int(others) + packed


def allocated_bytes(paths: Iterable[Path]) -> int:
    """What files take of the disk by now; a file system that sets nothing aside allocates as they are written."""
    return sum(path.stat().st_blocks * 512 for path in paths)
