"""Count a model's logical parameters, and the bytes that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbatch.core.adapter_names import ADAPTER_WEIGHTS
from qbatch.core.sources import weight_files
from qbatch.worker.methods.implementations import weights_of_model
from qbatch.worker.models.adapted_model import adapter_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Counts of a loaded model. Tied weights count once. An adapter's factors are bytes, but no parameters of the
    model: they stand for a part of weights that are counted already.

    ``weights_bytes``: the parameters and the quantization state needed to use them. ``buffer_bytes``: the other tensors
    of the modules (rotary tables, masks). ``memory_footprint_bytes``: transformers' own figure, which is parameters and
    buffers without quantization state.
    """

    num_parameters: int
    quantized_parameters: int
    weights_bytes: int
    quant_state_bytes: int
    buffer_bytes: int
    memory_footprint_bytes: int

    @property
    def quantized_fraction(self) -> float:
        return self.quantized_parameters / self.num_parameters

    @property
    def bits_per_param(self) -> float:
        return self.weights_bytes * 8 / self.num_parameters


def measure_size(model: Any) -> ModelSize:
    """Count ``model`` as loaded. Call it before any forward pass, which on some CPUs repacks a method's weights."""
    weights, parameters = weights_of_model(model), list(model.parameters())
    of_adapter = {id(parameter) for parameter in adapter_parameters(model).values()}
    own = [parameter for parameter in parameters if id(parameter) not in of_adapter]
    state_bytes = held_bytes(tensor for module in model.modules() for tensor in weights.state(module))
    return ModelSize(
        num_parameters=sum(weights.logical_elements(parameter) for parameter in own),
        quantized_parameters=sum(weights.logical_elements(p) for p in parameters if weights.is_quantized(p)),
        weights_bytes=held_bytes(tensor for p in parameters for tensor in weights.held(p)) + state_bytes,
        quant_state_bytes=state_bytes,
        buffer_bytes=held_bytes(model.buffers()),
        memory_footprint_bytes=weights.memory_footprint(model),
    )


def disk_bytes(folder: Path) -> int:
    """Bytes of the safetensors files that the model in ``folder`` is loaded from. Raises as ``weight_files`` does."""
    return sum(path.stat().st_size for path in weight_files(folder))


def adapter_disk_bytes(folder: Path | None) -> int:
    """The bytes of an adapter's factors on disk; 0 without one."""
    return 0 if folder is None else (folder / ADAPTER_WEIGHTS).stat().st_size


def held_bytes(tensors: Any) -> int:
    """Bytes of ``tensors``. A tensor that occurs twice counts once."""
    distinct = {(t.data_ptr(), t.nbytes) if t.numel() else (id(t), 0): t.nbytes for t in tensors}
    return sum(distinct.values())
