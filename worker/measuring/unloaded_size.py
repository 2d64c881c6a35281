"""Count a model's parameters and their bytes without loading it: from headers, and its class on the meta device.

The counts are those that ``measure_size`` gives of the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qbatch.core.adapter_names import ADAPTER_WEIGHTS
from qbatch.core.domain import DType
from qbatch.core.errors import SourceCorrupt
from qbatch.core.prior_quantization import stale_quantization
from qbatch.core.sources import read_config, read_header, read_headers
from qbatch.worker.measuring.speed.size import ModelSize
from qbatch.worker.methods.implementations import weights_of_config
from qbatch.worker.methods.packing import Packing
from qbatch.worker.models.architecture import ModelKind, kind_of
from qbatch.worker.models.load import quiet_libraries, translated
from qbatch.worker.quantizing.planning.expected_files import load_published
from qbatch.worker.quantizing.planning.loading import NotStreamable, Weight, trace_unquantized_loading
from qbatch.worker.quantizing.planning.skeleton import Skeleton, unquantized_skeleton
from qbatch.worker.quantizing.tensors.source_reader import SourceReader

_FACTOR_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadedModel:
    """``libraries`` are the packages that its method computes with."""

    kind: ModelKind
    size: ModelSize
    libraries: tuple[str, ...]


def count_unloaded(folder: Path, dtype: DType, *, trusted: bool = False, adapter: Path | None = None) -> UnloadedModel:
    """Count the source or published checkpoint in ``folder`` as it would be loaded in ``dtype`` (not "auto"), with the
    adapter in the folder ``adapter`` if there is one.

    Raises SourceCorrupt if its files are not those of its config, UnsafeSource, or Unsupported.
    """
    config = read_config(folder)
    is_stale = stale_quantization(config, read_headers(folder)) is not None
    weights = None if is_stale else weights_of_config(config.get("quantization_config"))
    quiet_libraries(weights)
    with translated(SourceCorrupt, f"cannot count {folder.name}"):
        if weights is None:
            skeleton = _unquantized(folder, dtype, trusted=trusted)
            size = _size(skeleton.model, dict(skeleton.model.named_parameters()), {}, None)
        else:
            skeleton, packing, quantized = load_published(folder, dtype, trusted=trusted)
            size = _size(skeleton.model, dict(_distinct(folder, skeleton.model)), quantized, packing)
            size = size if adapter is None else _with_adapter(size, adapter)
        kind = kind_of(skeleton.model.config, trusted=folder if trusted else None)
    return UnloadedModel(kind=kind, size=size, libraries=() if weights is None else weights.libraries)


def _with_adapter(size: ModelSize, adapter: Path) -> ModelSize:
    """PEFT loads the factors in float32, whatever they are stored in."""
    tensors = read_header(adapter / ADAPTER_WEIGHTS).tensors
    nbytes = sum(tensor.numel for tensor in tensors) * _FACTOR_BYTES
    return replace(
        size, weights_bytes=size.weights_bytes + nbytes, memory_footprint_bytes=size.memory_footprint_bytes + nbytes
    )


def _unquantized(folder: Path, dtype: DType, *, trusted: bool) -> Skeleton:
    skeleton = unquantized_skeleton(folder, dtype, trusted=trusted)
    with SourceReader(read_headers(folder), lambda _: None) as reader:
        try:
            trace_unquantized_loading(reader, skeleton, dtype)
        except NotStreamable:  # some tensors can only be converted with their data; their shapes follow from the config
            return unquantized_skeleton(folder, dtype, trusted=trusted)
    return skeleton


def _distinct(folder: Path, model: Any) -> Iterator[tuple[str, Any]]:
    """The parameters of a published model. Of tied ones the files hold one, unless their values differ."""
    stored = {tensor.name for header in read_headers(folder) for tensor in header.tensors}
    ties = model.all_tied_weights_keys
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in ties or {name, ties[name]} <= stored:
            yield name, parameter


def _size(
    model: Any, parameters: Mapping[str, Any], quantized: Mapping[str, Weight], packing: Packing | None
) -> ModelSize:
    plain = [parameter for name, parameter in parameters.items() if name not in quantized]
    shapes = [quantized[name].shape for name in parameters if name in quantized]
    parts = [_part_bytes(packing, rows, columns) for rows, columns in shapes if packing is not None]
    elements = sum(rows * columns for rows, columns in shapes)
    held_bytes = sum(parameter.nbytes for parameter in plain) + sum(codes for codes, _ in parts)
    state_bytes = sum(state for _, state in parts)
    buffer_bytes = sum(buffer.nbytes for buffer in model.buffers())
    return ModelSize(
        num_parameters=sum(parameter.numel() for parameter in plain) + elements,
        quantized_parameters=elements,
        weights_bytes=held_bytes + state_bytes,
        quant_state_bytes=state_bytes,
        buffer_bytes=buffer_bytes,
        memory_footprint_bytes=held_bytes + buffer_bytes,
    )


def _part_bytes(packing: Packing, rows: int, columns: int) -> tuple[int, int]:
    """The bytes of a quantized weight's codes, and of its scales and tables."""
    codes, *scales = (_bytes(dtype, shape) for dtype, shape in packing.part_shapes(rows, columns).values())
    return codes, sum(scales) + packing.table_bytes()


def _bytes(dtype: Any, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for length in shape:
        count *= length
    return int(count)
