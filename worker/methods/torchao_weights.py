"""The worker's part of torchao's methods. torchao's weights are tensor subclasses that hold codes and scales."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import torch

from qbatch.core.domain import Scheme
from qbatch.core.errors import SourceCorrupt
from qbatch.core.methods.description import MethodDescription
from qbatch.core.methods.torchao import COLUMN_STEP, GROUP_SIZE, LIBRARY, ROW_STEP, Torchao, WeightKind
from qbatch.worker.methods.method_weights import MethodWeights
from qbatch.worker.methods.packing import MakeNamedPart, MakePart, Packing, PartShapes, figures

_CODES = "qdata"
# The lowest compute capability whose tensor cores can run the int4 kernel.
_MIN_CAPABILITY = 8
# The kernel packs this many tiles of 16 columns together, for 32 threads, with two codes per byte of an int32.
_TILES = 8
# To dequantize int4 weights, this many columns of an identity matrix are multiplied at a time.
_PROBED_COLUMNS = 1024


class TorchaoWeights(MethodWeights):
    """int8 or int4 codes. Activations are quantized at run time, or not at all."""

    libraries = (LIBRARY,)
    why_whole = "torchao quantizes the layers of a model"

    def quantization_config(self, scheme: Scheme, skips: list[str] | None) -> Any:
        from transformers import TorchAoConfig

        return TorchAoConfig(_config(scheme), modules_to_not_convert=skips)

    def packing(self, scheme: Scheme) -> Packing:
        return TorchaoPacking(kind=_torchao_description(scheme).kind, group_size=GROUP_SIZE.of(scheme.options))

    def packing_of_config(self, config: Any) -> Packing:
        from torchao.quantization import (
            Int4WeightOnlyConfig,
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
        )

        kinds = {
            Int8DynamicActivationInt8WeightConfig: WeightKind.INT8_DYNAMIC,
            Int8WeightOnlyConfig: WeightKind.INT8,
            Int4WeightOnlyConfig: WeightKind.INT4,
        }
        kind = kinds.get(type(config.quant_type))
        if kind is None:
            raise SourceCorrupt(
                f"config.json has torchao's {type(config.quant_type).__name__}, which qbatch never writes"
            )
        return TorchaoPacking(
            kind=kind, group_size=getattr(config.quant_type, "group_size", None) or GROUP_SIZE.default
        )

    def why_not_on(self, description: MethodDescription, device: str) -> str | None:
        if not isinstance(description, Torchao) or description.kind is not WeightKind.INT4:
            return None
        if not device.startswith("cuda"):
            return f"{description.name} does not work on {device}"
        capability = torch.cuda.get_device_capability(device)
        if capability[0] >= _MIN_CAPABILITY:
            return None
        return (
            f"{description.name} needs a GPU of compute capability {_MIN_CAPABILITY}.0 or above; "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        )

    def why_not_loaded(self, names: Iterable[str]) -> str | None:
        """torchao 0.18 assumes that every tensor belongs to a module."""
        orphans = sorted(name for name in names if "." not in name)
        return f"torchao cannot load a checkpoint with {orphans[0]}, which belongs to no module" if orphans else None

    def files_with_unsorted_metadata(self, folder: Path) -> Iterable[Path]:
        """All weight files: their metadata describes each weight."""
        return sorted(folder.glob("*.safetensors"))

    def is_quantized(self, parameter: torch.Tensor) -> bool:
        return isinstance(getattr(parameter, _CODES, None), torch.Tensor)

    def held(self, parameter: torch.Tensor) -> Iterable[torch.Tensor]:
        return (getattr(parameter, _CODES),) if self.is_quantized(parameter) else (parameter,)

    def state(self, module: Any) -> Iterable[torch.Tensor]:
        weight: Any = getattr(module, "weight", None)
        if weight is None or not self.is_quantized(weight):
            return
        names = (*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ()))
        values = (getattr(weight, name) for name in names if name != _CODES)
        yield from (value for value in values if isinstance(value, torch.Tensor))

    def memory_footprint(self, model: Any) -> int:
        """Like transformers' own figure, which would count torchao's weights with 16 bits per value."""
        held = sum(tensor.nbytes for parameter in model.parameters() for tensor in self.held(parameter))
        return held + sum(int(buffer.nbytes) for buffer in model.buffers())

    def figures(self, exact: torch.Tensor, weight: Any) -> torch.Tensor:
        return figures(exact, _restored(weight))

    def quiet_import(self) -> None:
        importlib.import_module(LIBRARY)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchaoPacking(Packing):
    """The plain tensors that torchao flattens a weight into."""

    kind: WeightKind
    group_size: int

    def part_shapes(self, rows: int, columns: int) -> PartShapes:
        match self.kind:
            case WeightKind.INT8 | WeightKind.INT8_DYNAMIC:
                return {
                    _CODES: (torch.int8, (rows, columns)),
                    "scale": (torch.float32, (rows, 1)),
                    "zero_point": (torch.int8, (rows, 1)),
                }
            case WeightKind.INT4:
                rows, columns = _round_up(rows, ROW_STEP), _round_up(columns, COLUMN_STEP)
                return {
                    _CODES: (torch.int32, (rows // ROW_STEP, columns // (16 * _TILES), 32, _TILES // 2)),
                    "scale_and_zero": (torch.bfloat16, (columns // self.group_size, rows, 2)),
                }
            case _:
                assert_never(self.kind)

    def parameter(self, rows: int, columns: int, dtype: torch.dtype, part: MakePart) -> torch.nn.Parameter:
        return torch.nn.Parameter(part("weight", dtype, (rows, columns)), requires_grad=False)

    def why_skipped(self, rows: int, columns: int) -> str | None:
        if self.kind is not WeightKind.INT4 or columns % self.group_size == 0:
            return None
        return f"its width is not a multiple of the group size {self.group_size}"

    def as_stored(
        self, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], part: MakeNamedPart
    ) -> dict[str, Any]:
        stored = {}
        for name, tensor in state.items():
            if name not in shapes:
                stored[name] = tensor
                continue
            module, _, leaf = name.rpartition(".")
            for key, shape in self.part_shapes(*shapes[name]).items():
                stored[f"{module}._{leaf}_{key}"] = part(name, key, *shape)
        return stored


def _torchao_description(scheme: Scheme) -> Torchao:
    if not isinstance(scheme.description, Torchao):
        raise TypeError(f"{scheme.method} is not a method of torchao")
    return scheme.description


def _config(scheme: Scheme) -> Any:
    """torchao's own config. ``set_inductor_config`` is off because it would change how the whole process compiles."""
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
    )
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    kind = _torchao_description(scheme).kind
    match kind:
        case WeightKind.INT8_DYNAMIC:
            return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        case WeightKind.INT8:
            return Int8WeightOnlyConfig(set_inductor_config=False)
        case WeightKind.INT4:
            return Int4WeightOnlyConfig(
                group_size=scheme[GROUP_SIZE],
                int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D,
                set_inductor_config=False,
            )
        case _:
            assert_never(kind)


def _restored(weight: Any) -> torch.Tensor:
    """The dequantized values, float32 [rows, columns]. Only the int4 kernel knows the layout of int4 weights, so they
    are multiplied with the identity matrix, which gives the values exactly."""
    if getattr(weight, _CODES).dtype is torch.int8:
        dequantized: torch.Tensor = weight.dequantize(torch.float32)
        return dequantized
    rows, columns = weight.shape
    restored = torch.empty(rows, columns, dtype=torch.float32, device=weight.device)
    for start in range(0, columns, _PROBED_COLUMNS):
        count = min(_PROBED_COLUMNS, columns - start)
        probe = torch.zeros(count, columns, dtype=weight.dtype, device=weight.device)
        probe[:, start : start + count].fill_diagonal_(1)
        restored[:, start : start + count] = torch.nn.functional.linear(probe, weight).t()
    return restored


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


WEIGHTS = TorchaoWeights()
