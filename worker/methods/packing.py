"""The interface that converts a weight's values to stored tensors, for all methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qbatch.worker.methods.scratch import as_floats

PartShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of each stored part of a weight, by its key."""
MakePart = Callable[[str, torch.dtype, tuple[int, ...]], torch.Tensor]
"""Called with a part's key, dtype and shape; returns the part as a tensor without data."""
MakeNamedPart = Callable[[str, str, torch.dtype, tuple[int, ...]], torch.Tensor]
"""As ``MakePart``, with the weight's name as the first argument."""

# What the audit needs to know of a piece: the Frobenius norms of the error and of the values, which every method has,
# and the counts of unusual row scales, which only some have.
FIGURES = ("error_norm", "value_norm", "zero_scales", "infinite_scales")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPiece:
    """The stored parts of one quantized piece by key, and its FIGURES, float64 [4]; all on the device."""

    parts: Mapping[str, torch.Tensor]
    figures: torch.Tensor


class Packing(ABC):
    """How a weight [rows, columns] is stored."""

    marks_initialized = True
    """Whether transformers marks a layer as initialized once its weight is quantized, and does not initialize it."""

    is_weight_only = False
    """Whether a layer computes with the values of ``rounded``, and quantizes nothing else."""

    def nested_offset(self, weight: torch.Tensor) -> float | None:
        """The mean of a whole weight's block maxima, if its pieces need it, else None."""
        return None

    def rounded(self, values: torch.Tensor, nested_offset: float | None) -> torch.Tensor:
        """What a loaded checkpoint computes with instead of ``values``: float32 of the same shape. They are a piece, as
        for ``pack``, and ``nested_offset`` is that of the weight. Needs ``is_weight_only``."""
        raise NotImplementedError(f"{self} quantizes more than weights")

    @abstractmethod
    def part_shapes(self, rows: int, columns: int) -> PartShapes:
        """dtype and shape of every part that is computed from the weight's values, the codes first."""

    @abstractmethod
    def parameter(self, rows: int, columns: int, dtype: torch.dtype, part: MakePart) -> torch.nn.Parameter:
        """The parameter, without data, of a quantized weight in a loaded model. ``dtype`` is the dtype of its values
        before quantization."""

    def table_bytes(self) -> int:
        """The bytes of what a loaded weight needs besides its parts: code tables, and the mean of its scales."""
        return 0

    def why_unsupported(self, rows: int, columns: int) -> str | None:
        """Why a weight of this shape cannot be stored this way, which is an error; None if it can."""
        return None

    def why_skipped(self, rows: int, columns: int) -> str | None:
        """Why the library leaves a weight of this shape unquantized; None if it quantizes it."""
        return None

    def is_transposed(self, module: Any) -> bool:
        """Whether the source's weight is transposed before it is quantized into ``module``."""
        return False

    def attach_state(
        self,
        parameter: Any,
        shape: tuple[int, int],
        dtype: torch.dtype,
        offset: float | None,
        device: str,
        part: MakePart,
    ) -> None:
        """Attach the quantization state that ``state_dict()`` reads from a parameter without data, if the method has
        one."""
        return

    def as_stored(
        self, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], part: MakeNamedPart
    ) -> dict[str, Any]:
        """A model's state dict with its quantized weights (``shapes`` [rows, columns] by name) replaced by the parts
        that are stored."""
        return dict(state)

    def counted_elements(self, parameter: torch.Tensor) -> int:
        """The number of elements that ``PreTrainedModel.num_parameters`` counts for a quantized parameter."""
        return parameter.numel()


class StreamedPacking(Packing):
    """A packing that can quantize a weight piece by piece. Pieces start at multiples of ``unit`` values."""

    nested = False
    """Whether the mean of the block maxima of the whole weight is needed before any piece can be quantized."""
    block = 1
    """The number of values in a block, if ``nested``."""

    @abstractmethod
    def unit(self, columns: int) -> int:
        """The smallest number of values that are quantized independently of others, in a weight with ``columns``."""

    @abstractmethod
    def part_start(self, key: str, value: int, columns: int) -> int:
        """The byte offset in the part ``key`` of the result for value number ``value``, the first of a piece."""

    @abstractmethod
    def pack(self, values: torch.Tensor, columns: int, nested_offset: float | None) -> PackedPiece:
        """Quantize a piece: flat ``values`` of a weight with ``columns``, starting at a multiple of ``unit``.
        ``nested_offset`` is the mean of the whole weight's block maxima if ``nested``, else None."""

    def block_maxima(self, values: torch.Tensor) -> torch.Tensor:
        """The largest magnitude of each block, float32 [blocks]. ``values`` must start at a block. Needs ``nested``."""
        raise NotImplementedError(f"{self} is not nested")

    @abstractmethod
    def load_kernels(self, device: str) -> None:
        """Load the GPU kernels that ``pack`` uses, because the first call of each takes a fraction of a second."""


def load_kernels(device: str, packings: Iterable[StreamedPacking]) -> None:
    if device == "cpu":
        return
    for packing in packings:
        packing.load_kernels(device)
    torch.cuda.synchronize(device)


def figures(values: torch.Tensor, restored: torch.Tensor, row_scales: torch.Tensor | None = None) -> torch.Tensor:
    """The FIGURES of a quantized piece, float64 [4]. ``values`` are the original values, ``restored`` the dequantized
    ones, which are overwritten."""
    exact = as_floats(values, "exact")
    computed = [torch.linalg.vector_norm(tensor) for tensor in (restored.view_as(exact).sub_(exact), exact)]
    if row_scales is not None:
        computed += [(row_scales == 0).sum(), row_scales.isfinite().logical_not_().sum()]
    row = torch.zeros(len(FIGURES), dtype=torch.float64, device=values.device)
    for index, figure in enumerate(computed):
        row[index] = figure
    return row
