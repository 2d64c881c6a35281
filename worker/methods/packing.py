"""bitsandbytes' own quantization of a piece of a weight, and the shapes and names of what comes out.

Blocks of 64 values (and for double quantization, 256 of those) are independent of each other, and int8 rows are too,
so a weight quantized piece by piece gives the same bytes as in one go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import bitsandbytes as bnb
import torch

from qbatch.core.domain import Method, Scheme
from qbatch.worker.methods.bnb_fourbit import BLOCK, quantize_4bit
from qbatch.worker.methods.bnb_int8 import quantize_int8
from qbatch.worker.methods.scratch import as_floats

NESTED_BLOCK = 256
# A piece that starts at a multiple of this many values starts a block and a nested block.
PIECE_STEP = BLOCK * NESTED_BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How values become bytes. ``quant_type`` is "nf4", "fp4" or "int8"."""

    quant_type: str
    nested: bool
    storage: torch.dtype

    @classmethod
    def of(cls, scheme: Scheme) -> Packing:
        if scheme.method is Method.INT8:
            return cls(quant_type="int8", nested=False, storage=torch.int8)
        return cls(
            quant_type=scheme.method.value.removeprefix("bnb-"),
            nested=scheme.double_quant,
            storage=getattr(torch, scheme.quant_storage),
        )

    @property
    def is_int8(self) -> bool:
        return self.quant_type == "int8"

    def fills_whole_elements(self, values: int) -> bool:
        """Whether so many values fill whole elements of the storage dtype (of a byte, even half of one will do)."""
        return self.storage.itemsize == 1 or values % (2 * self.storage.itemsize) == 0

    def part_shapes(self, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every part that is cut from the values, for a weight [rows, columns]."""
        if self.is_int8:
            return {"weight": (torch.int8, (rows, columns)), "SCB": (torch.float32, (rows,))}
        values = rows * columns
        blocks = -(-values // BLOCK)
        packed_bytes = -(-values // 2)
        parts = {"weight": (self.storage, (packed_bytes // self.storage.itemsize, 1))}
        if not self.nested:
            return parts | {"absmax": (torch.float32, (blocks,))}
        return parts | {
            "absmax": (torch.uint8, (blocks,)),
            "nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK),)),
        }

    def part_start(self, key: str, value: int, columns: int) -> int:
        """Byte offset in the part ``key`` of what the value number ``value`` (a piece's first) becomes."""
        if self.is_int8:
            return value if key == "weight" else value // columns * 4
        if key == "weight":
            return value // 2
        if key == "nested_absmax":
            return value // PIECE_STEP * 4
        return value // BLOCK * (1 if self.nested else 4)


# What the audit needs of a piece: the Frobenius norms of the error and of the values, and (of int8) how many rows have
# a scale of zero, and how many one that is not finite.
FIGURES = ("error_norm", "value_norm", "zero_scales", "infinite_scales")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One piece's parts, and its FIGURES as one float64 tensor [4], all on its device."""

    parts: Mapping[str, torch.Tensor]
    figures: torch.Tensor


def pack(values: torch.Tensor, packing: Packing, nested_offset: float | None) -> Packed:
    """Quantize whole rows ``values`` [rows, columns], or for 4 bits flat ones that start a block (see PIECE_STEP).

    Double quantization, and that alone, needs the ``nested_offset`` of the whole weight.
    """
    if packing.nested != (nested_offset is not None):
        raise ValueError(f"{packing} and an offset of {nested_offset} do not go together")
    return _pack_int8(values) if packing.is_int8 else _pack_4bit(values.reshape(-1), packing, nested_offset)


def load_kernels(device: str, packings: Sequence[Packing]) -> None:
    """Have the GPU load what ``pack`` runs there: the first call of each kernel takes a fraction of a second."""
    if device == "cpu":
        return
    values = torch.zeros(1, PIECE_STEP, dtype=torch.bfloat16, device=device)
    for packing in packings:
        pack(values, packing, 0.0 if packing.nested else None)
    torch.cuda.synchronize(device)


def _pack_4bit(values: torch.Tensor, packing: Packing, nested_offset: float | None) -> Packed:
    codes, absmax = quantize_4bit(values, packing.quant_type, packing.storage)
    parts, scales = {"weight": codes, "absmax": absmax}, absmax
    if nested_offset is not None:
        nested, state = bnb.functional.quantize_blockwise(absmax - nested_offset, blocksize=NESTED_BLOCK)
        scales = bnb.functional.dequantize_blockwise(nested, state) + nested_offset
        parts |= {"absmax": nested, "nested_absmax": state.absmax}
    restored = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, scales, BLOCK, packing.quant_type, values.shape, torch.float32
    )
    return Packed(parts=parts, figures=figures(values, restored))


def _pack_int8(values: torch.Tensor) -> Packed:
    codes, scales, restored = quantize_int8(values)
    return Packed(parts={"weight": codes, "SCB": scales}, figures=figures(values, restored, scales))


def figures(values: torch.Tensor, restored: torch.Tensor, int8_scales: torch.Tensor | None = None) -> torch.Tensor:
    """The FIGURES of ``values`` that were quantized, and of what they stand for then (overwritten)."""
    exact = as_floats(values, "exact")
    found = [torch.linalg.vector_norm(one) for one in (restored.view_as(exact).sub_(exact), exact)]
    if int8_scales is not None:
        found += [(int8_scales == 0).sum(), int8_scales.isfinite().logical_not_().sum()]
    row = torch.zeros(len(FIGURES), dtype=torch.float64, device=values.device)
    for number, figure in enumerate(found):
        row[number] = figure
    return row


def block_maxima(values: torch.Tensor, packing: Packing) -> torch.Tensor:
    """float32 [blocks]: exactly what ``quantize_4bit`` gives as absmax, cheaper where that is possible."""
    flat = values.reshape(-1)
    if flat.device.type == "cpu" and flat.numel() % BLOCK == 0:
        maxima = flat.view(-1, BLOCK).abs().amax(dim=1)
        if not maxima.isnan().any():
            return maxima.float()
    absmax: torch.Tensor
    _, absmax = torch.ops.bitsandbytes.quantize_4bit.default(flat, BLOCK, packing.quant_type, packing.storage)
    return absmax


@cache
def code_maps(packing: Packing, device: str) -> Mapping[str, torch.Tensor]:
    """The constant tensors beside every 4-bit weight, as bitsandbytes makes them on ``device``."""
    _, state = bnb.functional.quantize_4bit(
        torch.zeros(BLOCK, 1, device=device), compress_statistics=packing.nested, quant_type=packing.quant_type
    )
    maps = {"quant_map": state.code.cpu()}
    return maps | {"nested_quant_map": state.state2.code.cpu()} if packing.nested else maps


def state_entries(
    packing: Packing, shape: tuple[int, int], dtype: torch.dtype, offset: float | None, device: str
) -> dict[str, torch.Tensor]:
    """The quantization state's entries in bitsandbytes' own names and order; those cut from values are empty."""
    empty = torch.empty(0)
    maps = code_maps(packing, device)
    nested = {}
    if packing.nested:
        inner = bnb.functional.QuantState(
            absmax=empty, code=maps["nested_quant_map"], blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        nested = {"state2": inner, "offset": torch.tensor(offset, dtype=torch.float32)}
    state = bnb.functional.QuantState(
        absmax=empty,
        shape=torch.Size(shape),
        # Each weight has its own: tensors that share memory are kept in one shard.
        code=maps["quant_map"].clone(),
        blocksize=BLOCK,
        quant_type=packing.quant_type,
        dtype=dtype,
        **nested,
    )
    entries: dict[str, torch.Tensor] = state.as_dict(packed=True)
    return entries
