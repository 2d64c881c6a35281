"""torchao: int8 weights with activations quantized on the fly, and int8 and int4 weights alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qbatch.core.errors import UsageError
from qbatch.core.kinds import DeviceKind, DType
from qbatch.core.methods.description import MethodDescription, MethodOption, Options, StoredTensor

LIBRARY = "torchao"
EXTRA = "torchao"
# A row's float32 scale, and a zero point of one byte that is stored though it is zero.
_ROW_BYTES = 5
# int4 is packed for tensor cores: rows and columns are filled up to multiples of these.
ROW_STEP, COLUMN_STEP = 8, 1024
# A bfloat16 scale and zero point for each group of a row.
_GROUP_BYTES = 4
# While a weight is quantized it stands there in float32 several times; where the int8 kernel cannot take a shape (fewer
# than 17 rows of activations, as in decoding) torchao multiplies in float32 too.
_WORKING_BYTES = 16
# Parts of a quantized weight, as safetensors has them beside each other.
_CODES, _STATE = "_weight_qdata", ("_weight_scale", "_weight_zero_point")

# Importing it tells of kernels that other builds of torch have, and of names that torch will drop.
_SILENCED = ("torchao", "torch.utils._pytree")
_FOOTPRINT = "codes and what is not quantized (transformers' own figure takes codes for 16-bit weights)"


class WeightKind(Enum):
    """What torchao makes of a weight."""

    INT8 = "int8"
    INT8_DYNAMIC = "int8 with dynamic activations"
    INT4 = "int4"


def _check_group_size(value: int) -> None:
    if value not in GROUP_SIZES:
        raise UsageError(f"a group of int4 weights has {', '.join(map(str, GROUP_SIZES))} values, not {value}")


GROUP_SIZES = (32, 64, 128, 256)
GROUP_SIZE: MethodOption[int] = MethodOption(
    name="group_size",
    flag="--group-size",
    help="torchao-int4: how many weights of a row share a scale.",
    default=128,
    choices=GROUP_SIZES,
    check=_check_group_size,
    words=lambda value: f" groups of {value}",
    unasked="a group size belongs to torchao-int4, which was not asked for",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Torchao(MethodDescription):
    """What torchao quantizes, one weight of a linear layer after the other."""

    kind: WeightKind

    def loaded_bytes(self, rows: int, columns: int, options: Options) -> float:
        if self.kind is not WeightKind.INT4:
            return rows * (columns + _ROW_BYTES)
        group_size = GROUP_SIZE.of(options)
        if columns % group_size:  # left as it is, at 16 bits
            return rows * columns * 2
        rows, columns = _up(rows, ROW_STEP), _up(columns, COLUMN_STEP)
        return rows * (columns / 2 + columns / group_size * _GROUP_BYTES)

    def working_bytes(self, largest_weight: int, options: Options) -> int:
        return _WORKING_BYTES * largest_weight

    def waits_because(self, options: Options) -> str | None:
        if self.kind is not WeightKind.INT8_DYNAMIC:
            return None
        return "torchao looks at the activations on the host before each product, but where the model is compiled."


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


INT8_DYNAMIC = Torchao(
    name="torchao-int8-dynamic",
    bits=8,
    libraries=(LIBRARY,),
    also_decided_by=("torch",),
    extra=EXTRA,
    takes_compute_dtype=False,
    silenced=_SILENCED,
    footprint=_FOOTPRINT,
    kind=WeightKind.INT8_DYNAMIC,
)
INT8 = Torchao(
    name="torchao-int8",
    bits=8,
    libraries=(LIBRARY,),
    also_decided_by=("torch",),
    extra=EXTRA,
    takes_compute_dtype=False,
    silenced=_SILENCED,
    footprint=_FOOTPRINT,
    kind=WeightKind.INT8,
)
INT4 = Torchao(
    name="torchao-int4",
    bits=4,
    options=(GROUP_SIZE,),
    libraries=(LIBRARY,),
    also_decided_by=("torch",),
    extra=EXTRA,
    takes_compute_dtype=False,
    silenced=_SILENCED,
    footprint=_FOOTPRINT,
    devices=frozenset({DeviceKind.CUDA}),
    dtypes=frozenset({DType.BFLOAT16}),
    kind=WeightKind.INT4,
)


class TorchaoCheckpoints:
    """torchao's checkpoints from outside."""

    quant_method = LIBRARY

    def words(self, settings: Mapping[str, Any]) -> str:
        """``torchao Int8WeightOnlyConfig``"""
        kind = settings.get("quant_type")
        default = kind.get("default") if isinstance(kind, Mapping) else None
        name = default.get("_type") if isinstance(default, Mapping) else None
        return f"torchao {name}" if isinstance(name, str) else "torchao"

    def num_parameters(self, tensors: Collection[StoredTensor]) -> int | None:
        """None for 4 bits, whose codes are filled up."""
        if any(tensor.name.endswith(_CODES) and tensor.dtype != "I8" for tensor in tensors):
            return None
        return sum(tensor.numel for tensor in tensors if not tensor.name.endswith(_STATE))
