"""bitsandbytes' half in the worker."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, assert_never

import torch

from qbatch.core.domain import Scheme
from qbatch.core.errors import SourceCorrupt
from qbatch.core.methods import bnb as described
from qbatch.core.sources import TensorInfo
from qbatch.worker.methods.bnb_states import is_state, state_problems
from qbatch.worker.methods.cpu_kernels import avoid_packed_kernel
from qbatch.worker.methods.method_weights import MethodWeights
from qbatch.worker.methods.packing import Packing, figures


class BnbWeights(MethodWeights):
    """4-bit codes with blocks' scales, or int8 codes with rows' scales."""

    libraries = (described.LIBRARY,)

    def quantization_config(self, scheme: Scheme, skips: list[str] | None) -> Any:
        from transformers import BitsAndBytesConfig

        if isinstance(_described(scheme), described.BnbInt8):
            threshold = float(scheme[described.INT8_THRESHOLD])
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=skips)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skips,
            bnb_4bit_quant_type=scheme.description.quant_type,
            bnb_4bit_use_double_quant=scheme[described.DOUBLE_QUANT],
            bnb_4bit_compute_dtype=getattr(torch, scheme.compute_dtype.value),
            bnb_4bit_quant_storage=scheme[described.QUANT_STORAGE],
        )

    def packing(self, scheme: Scheme) -> Packing:
        from qbatch.worker.methods.bnb_packing import FourBitPacking, Int8Packing

        description = _described(scheme)
        match description:
            case described.BnbFourBit():
                return FourBitPacking(
                    quant_type=str(description.quant_type),
                    nested=scheme[described.DOUBLE_QUANT],
                    storage=getattr(torch, scheme[described.QUANT_STORAGE]),
                )
            case described.BnbInt8():
                return Int8Packing()
            case _:
                assert_never(description)

    def packing_of_config(self, config: Any) -> Packing:
        from qbatch.worker.methods.bnb_packing import FourBitPacking, Int8Packing

        if config.load_in_8bit:
            return Int8Packing()
        if config.bnb_4bit_quant_type not in (described.NF4.quant_type, described.FP4.quant_type):
            raise SourceCorrupt(f"config.json names the unknown 4-bit type {config.bnb_4bit_quant_type}")
        return FourBitPacking(
            quant_type=config.bnb_4bit_quant_type,
            nested=config.bnb_4bit_use_double_quant,
            storage=config.bnb_4bit_quant_storage,
        )

    def is_quantized(self, parameter: torch.Tensor) -> bool:
        return getattr(parameter, "quant_state", None) is not None or _is_int8(parameter)

    def logical_elements(self, parameter: torch.Tensor) -> int:
        """Packed 4-bit codes count as what they decode to."""
        state = getattr(parameter, "quant_state", None)
        return parameter.numel() if state is None else int(torch.Size(state.shape).numel())

    def state(self, module: Any) -> Iterator[torch.Tensor]:
        weight: Any = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
            state = getattr(state, "state2", None)
        if _is_int8(weight):
            # The first forward moves the row scales from the weight to the layer's own state.
            scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
            yield scales

    def figures(self, exact: torch.Tensor, weight: Any) -> torch.Tensor:
        import bitsandbytes as bnb

        if _is_int8(weight):
            restored = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
            return figures(exact, restored, weight.SCB)
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        return figures(exact, bnb.functional.dequantize_4bit(weight.data, state))

    def audit(self, pieces: list[dict[str, float]]) -> dict[str, Any]:
        return {
            "int8_zero_scales": int(sum(piece["zero_scales"] for piece in pieces)),
            "int8_infinite_scales": int(sum(piece["infinite_scales"] for piece in pieces)),
        }

    def is_state_name(self, name: str) -> bool:
        return name.endswith(".SCB")

    def has_content(self, name: str) -> bool:
        return is_state(name)

    def content_problems(self, path: Path, tensor: TensorInfo, needed: torch.Tensor) -> list[str]:
        return state_problems(path, tensor, needed)

    def prepare(self, model: Any, device: str) -> int:
        return avoid_packed_kernel(model, device)

    def quiet_import(self) -> None:
        """int8 layers warn at every call that 16-bit inputs are cast, which is how LLM.int8 works. On a CPU with
        AVX512-BF16, importing the library would download a kernel from the hub: the import runs without that package.
        """
        if described.LIBRARY not in sys.modules:
            with _hub_kernels_hidden():
                importlib.import_module(described.LIBRARY)


def _described(scheme: Scheme) -> described.BnbFourBit | described.BnbInt8:
    if not isinstance(scheme.description, described.BnbFourBit | described.BnbInt8):
        raise TypeError(f"{scheme.method} is not bitsandbytes'")
    return scheme.description


def _is_int8(parameter: Any) -> bool:
    return type(parameter).__name__ == "Int8Params"


@contextmanager
def _hub_kernels_hidden() -> Iterator[None]:
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


WEIGHTS = BnbWeights()
