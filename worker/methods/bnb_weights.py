"""The worker's part of bitsandbytes' methods."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, assert_never

import torch

from qbatch.core.domain import Scheme
from qbatch.core.errors import SourceCorrupt
from qbatch.core.methods import bnb as bnb_methods
from qbatch.core.sources import TensorInfo
from qbatch.worker.methods.bnb_states import is_state, state_problems
from qbatch.worker.methods.cpu_kernels import avoid_packed_kernel, use_generic_kernel
from qbatch.worker.methods.method_weights import MethodWeights
from qbatch.worker.methods.packing import Packing, figures


class BnbWeights(MethodWeights):
    """4-bit codes with one scale per block, or int8 codes with one scale per row."""

    libraries = (bnb_methods.LIBRARY,)

    def quantization_config(self, scheme: Scheme, skips: list[str] | None) -> Any:
        from transformers import BitsAndBytesConfig

        description = _bnb_description(scheme)
        match description:
            case bnb_methods.BnbFourBit():
                return BitsAndBytesConfig(
                    load_in_4bit=True,
                    llm_int8_skip_modules=skips,
                    bnb_4bit_quant_type=description.quant_type,
                    bnb_4bit_use_double_quant=scheme[bnb_methods.DOUBLE_QUANT],
                    bnb_4bit_compute_dtype=getattr(torch, scheme.compute_dtype.value),
                    bnb_4bit_quant_storage=scheme[bnb_methods.QUANT_STORAGE],
                )
            case bnb_methods.BnbInt8():
                threshold = float(scheme[bnb_methods.INT8_THRESHOLD])
                return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=skips)
            case _:
                assert_never(description)

    def packing(self, scheme: Scheme) -> Packing:
        from qbatch.worker.methods.bnb_packing import FourBitPacking, Int8Packing

        description = _bnb_description(scheme)
        match description:
            case bnb_methods.BnbFourBit():
                return FourBitPacking(
                    quant_type=str(description.quant_type),
                    nested=scheme[bnb_methods.DOUBLE_QUANT],
                    storage=getattr(torch, scheme[bnb_methods.QUANT_STORAGE]),
                )
            case bnb_methods.BnbInt8():
                return Int8Packing()
            case _:
                assert_never(description)

    def packing_of_config(self, config: Any) -> Packing:
        from qbatch.worker.methods.bnb_packing import FourBitPacking, Int8Packing

        if config.load_in_8bit:
            return Int8Packing()
        if config.bnb_4bit_quant_type not in (bnb_methods.NF4.quant_type, bnb_methods.FP4.quant_type):
            raise SourceCorrupt(f"config.json has the unknown 4-bit type {config.bnb_4bit_quant_type}")
        return FourBitPacking(
            quant_type=config.bnb_4bit_quant_type,
            nested=config.bnb_4bit_use_double_quant,
            storage=config.bnb_4bit_quant_storage,
        )

    def is_quantized(self, parameter: torch.Tensor) -> bool:
        return getattr(parameter, "quant_state", None) is not None or _is_int8(parameter)

    def logical_elements(self, parameter: torch.Tensor) -> int:
        """The number of values that the packed codes decode to."""
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
        return figures(exact, self.restored(weight))

    def restored(self, weight: Any) -> torch.Tensor:
        import bitsandbytes as bnb

        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        values: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, state)
        return values

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

    def why_not_captured(self, model: Any) -> str | None:
        config = model.config.quantization_config
        if not config.load_in_8bit or not config.llm_int8_threshold:
            return None
        return "not capturable: LLM.int8's outlier path makes each layer wait for the host"

    def prepare(self, model: Any, device: str) -> int:
        return avoid_packed_kernel(model, device)

    def use_generic_kernels(self, model: Any) -> None:
        use_generic_kernel(model)
        # vLLM's plugin reads the mean of double-quantized scales while torch's default dtype is the model's.
        for state in _four_bit_states(model):
            if state.nested:
                state.offset = state.offset.to(model.dtype).float()

    def quantize_rest(self, model: Any) -> tuple[str, ...]:
        """As vLLM's plugin does with a 4-bit checkpoint: to NF4 with double quantization, whatever the rest has."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        if not any(_four_bit_states(model)):
            return ()
        names = set()
        for name, weight in _sixteen_bit_layers(model):
            codes, state = quantize_4bit(weight.data.contiguous(), compress_statistics=True, quant_type="nf4")
            weight.data = dequantize_4bit(codes, state)
            names.add(name.rpartition(".")[2])
        return tuple(sorted(names))

    def quiet_import(self) -> None:
        """On a CPU with AVX512-BF16, importing bitsandbytes would download a kernel from the hub, so the ``kernels``
        package that does this is hidden during the import. It would also import all of torch's compiler, for functions
        that nothing here calls: they are compiled when they are called."""
        if bnb_methods.LIBRARY not in sys.modules:
            with _hub_kernels_hidden(), _compiled_when_called():
                importlib.import_module(bnb_methods.LIBRARY)


def _bnb_description(scheme: Scheme) -> bnb_methods.BnbFourBit | bnb_methods.BnbInt8:
    if not isinstance(scheme.description, bnb_methods.BnbFourBit | bnb_methods.BnbInt8):
        raise TypeError(f"{scheme.method} is not a method of bitsandbytes")
    return scheme.description


def _four_bit_states(model: Any) -> Iterator[Any]:
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return (state for state in states if state is not None)


def _sixteen_bit_layers(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The names and weights of linear layers, and of experts that are one tensor [experts, rows, columns], without the
    head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        is_linear = isinstance(module, torch.nn.Linear) and module is not head
        for own, parameter in module.named_parameters(recurse=False):
            if is_linear and own == "weight" and getattr(parameter, "quant_state", None) is None:
                yield name, parameter
            elif parameter.ndim == 3 and "experts" in name.split("."):
                yield f"{name}.{own}", parameter


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


@contextmanager
def _compiled_when_called() -> Iterator[None]:
    before = torch.compile
    torch.compile = partial(_compile_when_called, before)
    try:
        yield
    finally:
        torch.compile = before


def _compile_when_called(compiler: Any, function: Any = None, **options: Any) -> Any:
    """What ``torch.compile(function, **options)`` returns, or its decorator, without compiling anything yet."""
    if function is None:
        return partial(_compile_when_called, compiler, **options)
    compiled = cache(lambda: compiler(function, **options))

    @wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        return compiled()(*args, **keywords)

    return call


WEIGHTS = BnbWeights()
