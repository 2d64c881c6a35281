"""How a weight's values become the tensors that are stored, whatever the method."""

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
"""Gives the part of a key as a tensor without data."""
MakeNamedPart = Callable[[str, str, torch.dtype, tuple[int, ...]], torch.Tensor]
"""The same of the weight of a name."""

# What the audit needs of a piece: the Frobenius norms of the error and of the values, and what the method counts
# besides, the first two of which every method has.
FIGURES = ("error_norm", "value_norm", "zero_scales", "infinite_scales")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One piece's parts, and its FIGURES as one float64 tensor [4], all on its device."""

    parts: Mapping[str, torch.Tensor]
    figures: torch.Tensor


class Packing(ABC):
    """How whole weights [rows, columns] are stored."""

    marks_initialized = True
    """Whether a layer whose weight was quantized is never initialized by transformers afterwards."""

    @abstractmethod
    def part_shapes(self, rows: int, columns: int) -> PartShapes:
        """Of every part that is cut from the values."""

    @abstractmethod
    def parameter(self, rows: int, columns: int, dtype: torch.dtype, part: MakePart) -> torch.nn.Parameter:
        """What a quantized weight of that dtype is in a loaded model, without data."""

    def why_unfit(self, rows: int, columns: int) -> str | None:
        """Why a weight of that shape cannot be quantized so; None where it can."""
        return None

    def why_left(self, rows: int, columns: int) -> str | None:
        """Why the library leaves a weight of that shape as it is; None where it quantizes it."""
        return None

    def is_transposed(self, module: Any) -> bool:
        """Whether the source's weight is turned before it is quantized into ``module``."""
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
        """Put what ``state_dict()`` takes beside the codes onto a parameter without data, where that takes any."""
        return

    def as_stored(
        self, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], part: MakeNamedPart
    ) -> dict[str, Any]:
        """A model's state with the parts of its quantized weights (``shapes`` by name) as they are stored."""
        return dict(state)

    def counted_elements(self, parameter: torch.Tensor) -> int:
        """As ``PreTrainedModel.num_parameters`` counts a quantized parameter."""
        return parameter.numel()


class StreamedPacking(Packing):
    """One that needs only a piece of the values at a time. Pieces start at multiples of ``unit``."""

    nested = False
    """Whether it needs the mean of a whole weight's block maxima before it can quantize a piece."""
    block = 1
    """The number of values whose maximum such a one takes."""

    @abstractmethod
    def unit(self, columns: int) -> int:
        """How many values are quantized independently of others, in a weight of so many columns."""

    @abstractmethod
    def part_start(self, key: str, value: int, columns: int) -> int:
        """Byte offset in the part ``key`` of what the value number ``value`` (a piece's first) becomes."""

    @abstractmethod
    def pack(self, values: torch.Tensor, columns: int, nested_offset: float | None) -> Packed:
        """Quantize flat ``values`` of a weight of so many columns, that start at a multiple of ``unit``. A nested one,
        and that alone, needs the ``nested_offset`` of the whole weight."""

    def block_maxima(self, values: torch.Tensor) -> torch.Tensor:
        """float32 [blocks], of values that start a block; of a nested one alone."""
        raise NotImplementedError(f"{self} is not nested")

    @abstractmethod
    def load_kernels(self, device: str) -> None:
        """Have a GPU load what ``pack`` runs there: the first call of each kernel takes a fraction of a second."""


def load_kernels(device: str, packings: Iterable[StreamedPacking]) -> None:
    if device == "cpu":
        return
    for packing in packings:
        packing.load_kernels(device)
    torch.cuda.synchronize(device)


def figures(values: torch.Tensor, restored: torch.Tensor, row_scales: torch.Tensor | None = None) -> torch.Tensor:
    """The FIGURES of ``values`` that were quantized, and of what they stand for then (overwritten)."""
    exact = as_floats(values, "exact")
    found = [torch.linalg.vector_norm(one) for one in (restored.view_as(exact).sub_(exact), exact)]
    if row_scales is not None:
        found += [(row_scales == 0).sum(), row_scales.isfinite().logical_not_().sum()]
    row = torch.zeros(len(FIGURES), dtype=torch.float64, device=values.device)
    for number, figure in enumerate(found):
        row[number] = figure
    return row
