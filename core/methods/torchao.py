"""torchao's methods: int8 weights with activations quantized at run time, and int8 or int4 weights only."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, assert_never

from qbatch.core.errors import UsageError
from qbatch.core.kinds import DeviceKind, DType
from qbatch.core.methods.description import MethodDescription, MethodOption, Options, StoredParts, StoredTensor

LIBRARY = "torchao"
EXTRA = "torchao"
# Each row has a float32 scale, and a zero point of one byte, which is stored although it is always zero.
_ROW_BYTES = 5
# int4 is packed for tensor cores: rows and columns are padded to multiples of these.
ROW_STEP, COLUMN_STEP = 8, 1024
# A bfloat16 scale and zero point for each group of a row.
_GROUP_BYTES = 4
# Quantizing a weight needs several float32 copies of it. Where the int8 kernel does not support a shape (fewer than 17
# rows of activations, as in decoding), torchao multiplies in float32 too.
_WORKING_BYTES = 16
# Suffixes of the tensors in which the parts of a quantized weight are stored.
_CODES, _STATE = "_weight_qdata", ("_weight_scale", "_weight_zero_point")

# Importing torchao warns of kernels that only other builds of torch have, and of deprecated names.
_SILENCED = ("torchao", "torch.utils._pytree")
_FOOTPRINT = "codes and unquantized weights (transformers would count codes as 16-bit weights)"

# How torchao 0.18 describes the quantization of activations in a file's metadata.
_ACTIVATIONS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}


class WeightKind(Enum):
    """How torchao quantizes a weight."""

    INT8 = "int8"
    INT8_DYNAMIC = "int8 with dynamic activations"
    INT4 = "int4"


def _check_group_size(value: int) -> None:
    if value not in GROUP_SIZES:
        raise UsageError(f"the group size must be one of {', '.join(map(str, GROUP_SIZES))}, not {value}")


GROUP_SIZES = (32, 64, 128, 256)
GROUP_SIZE: MethodOption[int] = MethodOption(
    name="group_size",
    flag="--group-size",
    help="torchao-int4: how many weights of a row share a scale.",
    default=128,
    choices=GROUP_SIZES,
    check=_check_group_size,
    name_suffix=lambda value: f" groups of {value}",
    error_if_unused="a group size applies only to torchao-int4, which was not given",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Torchao(MethodDescription):
    """A method of torchao, which quantizes the weights of linear layers."""

    kind: WeightKind
    libraries: tuple[str, ...] = (LIBRARY,)
    also_depends_on: tuple[str, ...] = ("torch",)
    extra: str | None = EXTRA
    takes_compute_dtype: bool = False
    silenced: tuple[str, ...] = _SILENCED
    is_streamed: bool = False
    footprint: str = _FOOTPRINT

    def loaded_bytes(self, rows: int, columns: int, options: Options) -> float:
        match self.kind:
            case WeightKind.INT8 | WeightKind.INT8_DYNAMIC:
                return rows * (columns + _ROW_BYTES)
            case WeightKind.INT4:
                return _int4_bytes(rows, columns, GROUP_SIZE.of(options))
            case _:
                assert_never(self.kind)

    def stored_parts(self, name: str, rows: int, columns: int, options: Options, dtype: str) -> StoredParts | None:
        module, _, leaf = name.rpartition(".")
        prefix = f"{module}._{leaf}_"
        match self.kind:
            case WeightKind.INT8 | WeightKind.INT8_DYNAMIC:
                return {
                    f"{prefix}qdata": ("I8", (rows, columns)),
                    f"{prefix}scale": ("F32", (rows, 1)),
                    f"{prefix}zero_point": ("I8", (rows, 1)),
                }
            case WeightKind.INT4:
                return _int4_parts(prefix, rows, columns, GROUP_SIZE.of(options))
            case _:
                assert_never(self.kind)

    def stored_metadata(self, columns: Mapping[str, int | None], dtype: str) -> Mapping[str, str]:
        each = {name: self._metadata(count, dtype) for name, count in columns.items()}
        return each | {"tensor_names": json.dumps(list(columns))}

    def _metadata(self, columns: int | None, dtype: str) -> str:
        if columns is None:
            return json.dumps({"_type": "Tensor"})
        data = {
            "act_quant_kwargs": _ACTIVATIONS if self.kind is WeightKind.INT8_DYNAMIC else None,
            "reduce_range": False,
            "block_size": [1, columns],
            "dtype": {"_type": "torch.dtype", "_data": dtype},
        }
        names = ["zero_point", "qdata", "scale"]
        return json.dumps({"_type": "Int8Tensor", "_data": data, "_tensor_data_names": names})

    def working_bytes(self, largest_weight: int, options: Options) -> int:
        return _WORKING_BYTES * largest_weight

    def synchronization_cause(self, options: Options) -> str | None:
        if self.kind is not WeightKind.INT8_DYNAMIC:
            return None
        return "Unless the model is compiled, torchao inspects the activations on the host before each matrix product."


def _int4_bytes(rows: int, columns: int, group_size: int) -> float:
    if columns % group_size:  # stays unquantized, at 16 bits
        return rows * columns * 2
    rows, columns = _round_up(rows, ROW_STEP), _round_up(columns, COLUMN_STEP)
    return rows * (columns / 2 + columns / group_size * _GROUP_BYTES)


def _int4_parts(prefix: str, rows: int, columns: int, group_size: int) -> StoredParts | None:
    if columns % group_size:
        return None
    rows, columns = _round_up(rows, ROW_STEP), _round_up(columns, COLUMN_STEP)
    return {
        f"{prefix}qdata": ("I32", (rows // ROW_STEP, columns // 128, 32, 4)),
        f"{prefix}scale_and_zero": ("BF16", (columns // group_size, rows, 2)),
    }


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


INT8_DYNAMIC = Torchao(
    name="torchao-int8-dynamic",
    bits=8,
    kind=WeightKind.INT8_DYNAMIC,
)
INT8 = Torchao(
    name="torchao-int8",
    bits=8,
    kind=WeightKind.INT8,
)
INT4 = Torchao(
    name="torchao-int4",
    bits=4,
    options=(GROUP_SIZE,),
    devices=frozenset({DeviceKind.CUDA}),
    dtypes=frozenset({DType.BFLOAT16}),
    is_layout_known=False,
    kind=WeightKind.INT4,
)


class TorchaoCheckpoints:
    """Reads torchao's checkpoints from their config and headers."""

    quant_method = LIBRARY
    packed_parts = ("._weight_scale", "._weight_scale_and_zero")

    def describe(self, settings: Mapping[str, Any]) -> str:
        """``torchao Int8WeightOnlyConfig``"""
        kind = settings.get("quant_type")
        default = kind.get("default") if isinstance(kind, Mapping) else None
        name = default.get("_type") if isinstance(default, Mapping) else None
        return f"torchao {name}" if isinstance(name, str) else "torchao"

    def num_parameters(self, tensors: Collection[StoredTensor]) -> int | None:
        """The number of parameters; None for 4 bits, whose codes are padded."""
        if any(tensor.name.endswith(_CODES) and tensor.dtype != "I8" for tensor in tensors):
            return None
        return sum(tensor.numel for tensor in tensors if not tensor.name.endswith(_STATE))
