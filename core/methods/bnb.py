"""bitsandbytes' methods: NF4 and FP4 with 4 bits, and LLM.int8 with 8 bits."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qbatch.core.errors import UsageError
from qbatch.core.kinds import FLOAT8, FLOATS
from qbatch.core.methods.description import MethodDescription, MethodOption, Options, StoredParts, StoredTensor

LIBRARY = "bitsandbytes"
_ENVIRONMENT = ("BNB_", "BITSANDBYTES_")
# Each block of this many values has a float32 scale, or one of a single byte with double quantization.
BLOCK = 64
# With double quantization, so many of those scales share a float32 scale.
_NESTED_BLOCK = 256
# The tables of what the codes of weights and of quantized scales stand for.
_CODES, _NESTED_CODES = 16, 256
# What else is needed to use a weight is stored as text in a tensor: this and the type of its codes end its name.
_STATE_TEXT = "quant_state.bitsandbytes__"
# The mean of the scales is a part of that text, whose length is known only once it was computed.
_LIKELY_MEAN = "0.07314682006835938"
_MEAN_VARIES_BYTES = 4
_STORAGE = {"uint8": ("U8", 1), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}
# LLM.int8 dequantizes the columns for which the input has an outlier, in the worst case all of them: a byte of code and
# two float32 per value.
_OUTLIER_BYTES = 9
# Suffixes of the tensors stored with a weight, apart from ".quant_state.", which is followed by the name of the type.
_STATE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")


def _check_threshold(value: float) -> None:
    if not 0 <= value < math.inf:
        raise UsageError(f"the int8 threshold must be finite and at least 0, not {value}")


DOUBLE_QUANT: MethodOption[bool] = MethodOption(
    name="double_quant",
    flag="--double-quant",
    help="Also quantize the 4-bit scales.",
    default=False,
    error_if_unused="double quantization needs a 4-bit scheme: add 4 to the bit widths",
)
INT8_THRESHOLD: MethodOption[float] = MethodOption(
    name="int8_threshold",
    flag="--int8-threshold",
    help="The outlier threshold of LLM.int8; 0 turns the outlier path and its synchronisations off.",
    default=6.0,
    check=_check_threshold,
    name_suffix=lambda value: f" threshold {value:g}",
)
QUANT_STORAGE: MethodOption[str] = MethodOption(
    name="quant_storage",
    flag="--quant-storage",
    help="The dtype in which packed 4-bit codes are stored (FSDP-QLoRA needs the compute dtype).",
    default="uint8",
    choices=("uint8", "float16", "bfloat16", "float32"),
    name_suffix=lambda value: f" stored as {value}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bnb(MethodDescription):
    """A method of bitsandbytes, which ``--bits`` may select."""

    selected_by_bits: bool = True
    libraries: tuple[str, ...] = (LIBRARY,)
    silenced: tuple[str, ...] = (LIBRARY,)
    environment: tuple[str, ...] = _ENVIRONMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class BnbFourBit(_Bnb):
    """4-bit codes with one scale per block of 64 values."""

    is_recoverable: bool = True

    def loaded_bytes(self, rows: int, columns: int, options: Options) -> float:
        scale_bytes = 1 if DOUBLE_QUANT.of(options) else 4
        return rows * columns * (0.5 + scale_bytes / BLOCK)

    def stored_parts(self, name: str, rows: int, columns: int, options: Options, dtype: str) -> StoredParts | None:
        storage, width = _STORAGE[QUANT_STORAGE.of(options)]
        is_nested = DOUBLE_QUANT.of(options)
        blocks = -(-rows * columns // BLOCK)
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": BLOCK,
            "dtype": dtype,
            "shape": [rows, columns],
        }
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            name: (storage, (-(-rows * columns // 2) // width, 1)),
            f"{name}.absmax": ("U8" if is_nested else "F32", (blocks,)),
            f"{name}.quant_map": ("F32", (_CODES,)),
        }
        if is_nested:
            state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0}
            parts[f"{name}.nested_absmax"] = ("F32", (-(-blocks // _NESTED_BLOCK),))
            parts[f"{name}.nested_quant_map"] = ("F32", (_NESTED_CODES,))
        length = len(json.dumps(state)) + (len(_LIKELY_MEAN) - 1 if is_nested else 0)
        return parts | {f"{name}.{_STATE_TEXT}{self.quant_type}": ("U8", (length,))}

    def held_parts(self, parts: StoredParts) -> StoredParts:
        # What is stored as text, the offset of double quantization among it, is read into numbers.
        offset = {name: ("F32", ()) for name in parts if name.endswith(".nested_absmax")}
        held = {name: part for name, part in parts.items() if f".{_STATE_TEXT}" not in name}
        return held | {f"{name} offset": part for name, part in offset.items()}

    def varying_bytes(self, options: Options) -> int:
        return _MEAN_VARIES_BYTES if DOUBLE_QUANT.of(options) else 0

    def config_for_loaders(self, options: Options, compute_dtype: str) -> Mapping[str, Any] | None:
        return {
            "quant_method": LIBRARY,
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": QUANT_STORAGE.of(options),
        }

    def title(self, options: Options) -> str:
        return f"{self.name} double" if DOUBLE_QUANT.of(options) else self.name

    def defects(self, audit: Mapping[str, Any]) -> Iterable[str]:
        return _infinite_scales(audit)

    def cpu_remark(self, name: str) -> str | None:
        return f"All 4-bit layers of {name} can use the packed AVX512-BF16 kernel, if the processor supports it."

    def cpu_warning(self, slow_layers: int) -> str | None:
        return (
            f"on a CPU with AVX512-BF16, inference with plain transformers fails at {slow_layers} of its 4-bit layers: "
            "bitsandbytes' packed kernel does not take such shapes, so the generic kernel was measured"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BnbInt8(_Bnb):
    """int8 codes with one scale per row. Input columns with values over a threshold are multiplied at 16 bits."""

    def check(self, options: Options) -> None:
        refuse_double_quantization(self.name, options)

    def loaded_bytes(self, rows: int, columns: int, options: Options) -> float:
        return float(rows * columns)

    def stored_parts(self, name: str, rows: int, columns: int, options: Options, dtype: str) -> StoredParts | None:
        module = name.removesuffix(".weight")
        return {
            name: ("I8", (rows, columns)),
            f"{module}.SCB": ("F32", (rows,)),
            f"{module}.weight_format": ("U8", ()),
        }

    def held_parts(self, parts: StoredParts) -> StoredParts:
        return {name: part for name, part in parts.items() if not name.endswith(".weight_format")}

    def working_bytes(self, largest_weight: int, options: Options) -> int:
        return _OUTLIER_BYTES * largest_weight if INT8_THRESHOLD.of(options) else 0

    def config_for_loaders(self, options: Options, compute_dtype: str) -> Mapping[str, Any] | None:
        return {"quant_method": LIBRARY, "load_in_8bit": True}

    def audit_lines(self, audit: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
        if audit.get("int8_zero_scales") is None:
            return
        zero, infinite = audit["int8_zero_scales"], audit.get("int8_infinite_scales")
        yield "int8 scales", f"{zero} zero (rows of zeros), {infinite} infinite (rows with values over 65504)"

    def defects(self, audit: Mapping[str, Any]) -> Iterable[str]:
        return _infinite_scales(audit)

    def speed_depends_on_values(self, options: Options) -> bool:
        """Outliers are found, and computed separately, by value."""
        return bool(INT8_THRESHOLD.of(options))

    def synchronization_cause(self, options: Options) -> str | None:
        if INT8_THRESHOLD.of(options) == 0:
            return None
        return (
            f"LLM.int8's outlier path causes these waits; {INT8_THRESHOLD.flag} 0 turns it off, which makes a "
            "different scheme."
        )


def _infinite_scales(audit: Mapping[str, Any]) -> Iterable[str]:
    infinite = audit.get("int8_infinite_scales")
    if infinite:
        verb = "is" if infinite == 1 else "are"
        yield f"{infinite} of its int8 scales {verb} infinite: rows with values over 65504 are lost"


def refuse_double_quantization(name: str, options: Options) -> None:
    if DOUBLE_QUANT.of(options):
        raise UsageError(f"double quantization needs a 4-bit method; {name} has none")


NF4 = BnbFourBit(
    name="bnb-nf4",
    aliases=("nf4",),
    bits=4,
    quant_type="nf4",
    options=(DOUBLE_QUANT, QUANT_STORAGE),
    inactive_options=(INT8_THRESHOLD,),
)
FP4 = BnbFourBit(
    name="bnb-fp4",
    aliases=("fp4",),
    bits=4,
    quant_type="fp4",
    options=(DOUBLE_QUANT, QUANT_STORAGE),
    inactive_options=(INT8_THRESHOLD,),
)
INT8 = BnbInt8(
    name="bnb-int8",
    aliases=("llm-int8",),
    bits=8,
    options=(INT8_THRESHOLD,),
    inactive_options=(DOUBLE_QUANT, QUANT_STORAGE),
)


class BnbCheckpoints:
    """Reads bitsandbytes' checkpoints from their config and headers."""

    quant_method = LIBRARY
    packed_parts = (".weight.absmax", ".SCB")

    def describe(self, settings: Mapping[str, Any]) -> str:
        """``bitsandbytes 4 bits (nf4, double quantization)``"""
        if settings.get("load_in_8bit"):
            return "bitsandbytes 8 bits"
        kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
        double = ", double quantization" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"bitsandbytes 4 bits ({kind}{double})"

    def num_parameters(self, tensors: Collection[StoredTensor]) -> int | None:
        """The number of parameters; one too many for each 4-bit weight with an odd number of values."""
        names = {tensor.name for tensor in tensors}
        return sum(_elements(tensor, names) for tensor in tensors)


def _elements(tensor: StoredTensor, names: set[str]) -> int:
    if tensor.name.endswith(_STATE) or ".quant_state." in tensor.name:
        return 0
    if f"{tensor.name}.absmax" in names:
        return tensor.nbytes * 2
    return tensor.numel if tensor.dtype in (*FLOATS, *FLOAT8, "I8") else 0


# The relative error of NF4 is about 0.1.
TRIAL = """
import bitsandbytes
codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
restored = bitsandbytes.functional.dequantize_4bit(codes, state)
"""
"""Python code with which ``qbatch doctor`` tests the library: it quantizes ``weight`` and sets ``restored``."""
