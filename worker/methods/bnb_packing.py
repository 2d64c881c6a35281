"""bitsandbytes' quantization of a piece of a weight, and the shapes and names of the stored tensors.

Blocks of 64 values (with double quantization, groups of 256 blocks) are independent of each other, and so are int8
rows. Quantizing a weight piece by piece therefore gives the same bytes as quantizing it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch

from qbatch.core.methods.bnb import BLOCK
from qbatch.worker.methods.bnb_fourbit import quantize_4bit
from qbatch.worker.methods.bnb_int8 import quantize_int8
from qbatch.worker.methods.packing import MakePart, PackedPiece, PartShapes, StreamedPacking, figures

NESTED_BLOCK = 256
# A multiple of this many values is the start of both a block and a nested block.
PIECE_STEP = BLOCK * NESTED_BLOCK


class _BnbPacking(StreamedPacking):
    def is_transposed(self, module: Any) -> bool:
        return module.source_cls is not torch.nn.Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Packing(_BnbPacking):
    """LLM.int8: int8 codes with one scale per row."""

    marks_initialized = False

    def part_shapes(self, rows: int, columns: int) -> PartShapes:
        return {"weight": (torch.int8, (rows, columns)), "SCB": (torch.float32, (rows,))}

    def parameter(self, rows: int, columns: int, dtype: torch.dtype, part: MakePart) -> torch.nn.Parameter:
        parts = {key: part(key, *shape) for key, shape in self.part_shapes(rows, columns).items()}
        parameter = torch.nn.Parameter(parts["weight"], requires_grad=False)
        parameter.SCB = parts["SCB"]  # type: ignore[attr-defined]
        return parameter

    def unit(self, columns: int) -> int:
        return columns

    def part_start(self, key: str, value: int, columns: int) -> int:
        return value if key == "weight" else value // columns * 4

    def pack(self, values: torch.Tensor, columns: int, nested_offset: float | None) -> PackedPiece:
        rows = values.reshape(-1, columns)
        codes, scales, restored = quantize_int8(rows)
        return PackedPiece(parts={"weight": codes, "SCB": scales}, figures=figures(rows, restored, scales))

    def load_kernels(self, device: str) -> None:
        self.pack(torch.zeros(PIECE_STEP, dtype=torch.bfloat16, device=device), PIECE_STEP, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitPacking(_BnbPacking):
    """4-bit codes with one scale per block of 64 values. ``quant_type`` is "nf4" or "fp4"; ``nested`` is double
    quantization; ``storage`` is the dtype in which packed codes are stored."""

    quant_type: str
    nested: bool
    storage: torch.dtype
    block: int = BLOCK
    is_weight_only = True

    def why_unsupported(self, rows: int, columns: int) -> str | None:
        # A storage dtype of one byte may be left half filled.
        if self.storage.itemsize == 1 or rows * columns % (2 * self.storage.itemsize) == 0:
            return None
        return f"does not fill a whole number of {self.storage} elements: choose another --quant-storage"

    def part_shapes(self, rows: int, columns: int) -> PartShapes:
        values = rows * columns
        blocks = -(-values // BLOCK)
        packed_bytes = -(-values // 2)
        parts: PartShapes = {"weight": (self.storage, (packed_bytes // self.storage.itemsize, 1))}
        if not self.nested:
            return parts | {"absmax": (torch.float32, (blocks,))}
        return parts | {
            "absmax": (torch.uint8, (blocks,)),
            "nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK),)),
        }

    def parameter(self, rows: int, columns: int, dtype: torch.dtype, part: MakePart) -> torch.nn.Parameter:
        codes = part("weight", *self.part_shapes(rows, columns)["weight"])
        return torch.nn.Parameter(codes, requires_grad=False)

    def attach_state(
        self,
        parameter: Any,
        shape: tuple[int, int],
        dtype: torch.dtype,
        offset: float | None,
        device: str,
        part: MakePart,
    ) -> None:
        entries = state_entries(self, shape, dtype, offset, device)
        shapes = self.part_shapes(*shape)
        for key in entries.keys() & shapes.keys():
            entries[key] = part(key, *shapes[key])
        parameter.quant_state = _State(entries)

    def table_bytes(self) -> int:
        tables = sum(table.nbytes for table in code_maps(self, "cpu").values())
        return tables + (torch.float32.itemsize if self.nested else 0)

    def counted_elements(self, parameter: torch.Tensor) -> int:
        """Two elements for each byte of packed codes."""
        return parameter.numel() * 2 * parameter.element_size()

    def unit(self, columns: int) -> int:
        return PIECE_STEP

    def part_start(self, key: str, value: int, columns: int) -> int:
        if key == "weight":
            return value // 2
        if key == "nested_absmax":
            return value // PIECE_STEP * 4
        return value // BLOCK * (1 if self.nested else 4)

    def pack(self, values: torch.Tensor, columns: int, nested_offset: float | None) -> PackedPiece:
        if self.nested != (nested_offset is not None):
            raise ValueError(f"an offset of {nested_offset} does not fit {self}: exactly nested packings need one")
        values = values.reshape(-1)
        parts, scales = self._quantized(values, nested_offset)
        return PackedPiece(parts=parts, figures=figures(values, self._restored(parts["weight"], scales, values.shape)))

    def nested_offset(self, weight: torch.Tensor) -> float | None:
        return float(self.block_maxima(weight.reshape(-1)).mean()) if self.nested else None

    def rounded(self, values: torch.Tensor, nested_offset: float | None) -> torch.Tensor:
        parts, scales = self._quantized(values.reshape(-1), nested_offset)
        return self._restored(parts["weight"], scales, values.shape)

    def _quantized(
        self, values: torch.Tensor, nested_offset: float | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The stored parts of flat ``values``, and the scale of each block."""
        codes, absmax = quantize_4bit(values, self.quant_type, self.storage)
        if nested_offset is None:
            return {"weight": codes, "absmax": absmax}, absmax
        nested, state = bnb.functional.quantize_blockwise(absmax - nested_offset, blocksize=NESTED_BLOCK)
        scales = bnb.functional.dequantize_blockwise(nested, state) + nested_offset
        return {"weight": codes, "absmax": nested, "nested_absmax": state.absmax}, scales

    def _restored(self, codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        restored: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes, scales, BLOCK, self.quant_type, shape, torch.float32
        )
        return restored

    def block_maxima(self, values: torch.Tensor) -> torch.Tensor:
        """Exactly the absmax of ``quantize_4bit``, computed without quantizing where possible."""
        flat = values.reshape(-1)
        if flat.device.type == "cpu" and flat.numel() % BLOCK == 0:
            maxima = flat.view(-1, BLOCK).abs().amax(dim=1)
            if not maxima.isnan().any():
                return maxima.float()
        absmax: torch.Tensor
        _, absmax = torch.ops.bitsandbytes.quantize_4bit.default(flat, BLOCK, self.quant_type, self.storage)
        return absmax

    def load_kernels(self, device: str) -> None:
        values = torch.zeros(PIECE_STEP, dtype=torch.bfloat16, device=device)
        self.pack(values, PIECE_STEP, 0.0 if self.nested else None)


class _State:
    """Stands in for bitsandbytes' QuantState in ``state_dict()``."""

    def __init__(self, entries: dict[str, torch.Tensor]) -> None:
        self._entries = entries

    def as_dict(self, *, packed: bool) -> dict[str, torch.Tensor]:
        if not packed:
            raise ValueError("only the packed form of the quantization state is available")
        return self._entries


@cache
def code_maps(packing: FourBitPacking, device: str) -> Mapping[str, torch.Tensor]:
    """The constant code tables stored with every 4-bit weight, by name, as bitsandbytes creates them on ``device``."""
    _, state = bnb.functional.quantize_4bit(
        torch.zeros(BLOCK, 1, device=device), compress_statistics=packing.nested, quant_type=packing.quant_type
    )
    maps = {"quant_map": state.code.cpu()}
    return maps | {"nested_quant_map": state.state2.code.cpu()} if packing.nested else maps


def state_entries(
    packing: FourBitPacking, shape: tuple[int, int], dtype: torch.dtype, offset: float | None, device: str
) -> dict[str, torch.Tensor]:
    """The entries of bitsandbytes' quantization state, with its names and in its order. Entries that depend on the
    weight's values are empty tensors."""
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
        # Each weight needs its own copy, because tensors that share memory are kept in one shard.
        code=maps["quant_map"].clone(),
        blocksize=BLOCK,
        quant_type=packing.quant_type,
        dtype=dtype,
        **nested,
    )
    entries: dict[str, torch.Tensor] = state.as_dict(packed=True)
    return entries
