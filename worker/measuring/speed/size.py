"""How large a model is: logical parameters, and the bytes that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qbatch.core.sources import weight_files


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Counts of a loaded model. Tied weights count once. ``weights_bytes`` is the parameters and, where they are
    quantized, the state needed to use them; ``buffer_bytes`` is what else the modules hold (rotary tables, masks).

    ``memory_footprint_bytes`` is transformers' own figure: parameters and buffers, without quantization state.
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
    """Count ``model`` as loaded. Call it before any forward: on some CPUs bitsandbytes repacks its weights then."""
    parameters = list(model.parameters())
    state = [tensor for module in model.modules() for tensor in quant_state(module)]
    state_bytes = held_bytes(state)
    return ModelSize(
        num_parameters=sum(logical_elements(parameter) for parameter in parameters),
        quantized_parameters=sum(logical_elements(p) for p in parameters if _is_quantized(p)),
        weights_bytes=held_bytes(parameters) + state_bytes,
        quant_state_bytes=state_bytes,
        buffer_bytes=held_bytes(model.buffers()),
        memory_footprint_bytes=int(model.get_memory_footprint()),
    )


def disk_bytes(folder: Path) -> int:
    """Bytes of the safetensors files that the model in ``folder`` is loaded from. Raises as ``weight_files`` does."""
    return sum(path.stat().st_size for path in weight_files(folder))


def _is_quantized(parameter: torch.Tensor) -> bool:
    return getattr(parameter, "quant_state", None) is not None or type(parameter).__name__ == "Int8Params"


def logical_elements(parameter: torch.Tensor) -> int:
    """Elements of the weight that a parameter stands for: packed 4-bit codes count as what they decode to."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def quant_state(module: Any) -> Iterator[torch.Tensor]:
    """The tensors beside ``module.weight`` that bitsandbytes needs to use it."""
    weight: Any = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
        state = getattr(state, "state2", None)
    if type(weight).__name__ == "Int8Params":
        # The first forward moves the row scales from the weight to the layer's own state.
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
        yield scales


def held_bytes(tensors: Any) -> int:
    """Bytes of ``tensors``, one that is there twice counted once."""
    distinct = {(t.data_ptr(), t.nbytes) if t.numel() else (id(t), 0): t.nbytes for t in tensors}
    return sum(distinct.values())
