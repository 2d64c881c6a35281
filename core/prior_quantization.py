"""Whether a source is quantized already: judged by its tensors, since a config may speak of a state that is over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qbatch.core.errors import SourceCorrupt, Unsupported
from qbatch.core.kinds import FLOAT8
from qbatch.core.methods.registry import family_of
from qbatch.core.sources import Header, TensorInfo

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where a config, or a part of it, says how its weights are quantized."""
# Suffixes of tensors that quantizers of all kinds store with or instead of a weight.
_SUFFIXES = (
    ".SCB",
    ".absmax",
    ".quant_map",
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    "_weight_qdata",
)
_NARROW_FLOATS = (*FLOAT8, "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")
_WHOLE_NUMBERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
# Indices of positions are stored with 64 bits; codes never are.
_CODES = ("I8", "I16", "I32", "U8", "U16", "U32")
# Methods whose checkpoints always have packed tensors. Others may compute with fewer bits from 16-bit weights.
_ALWAYS_PACKED = frozenset(
    {
        "aqlm", "auto-round", "awq", "bitsandbytes", "eetq", "fbgemm_fp8", "fp8", "gptq", "higgs", "hqq", "mxfp4",
        "mxfp8", "nvfp4", "quanto", "spqr", "torchao", "vptq",
    }
)  # fmt: skip


def refuse_quantized(config: Mapping[str, Any], headers: Sequence[Header]) -> None:
    """Raise Unsupported if the source is quantized already: its values are neither quantized again, nor a baseline."""
    declared = _declared(config)
    packed = next(_packed(headers, is_declared=declared is not None), None)
    if packed is not None:
        evidence = f"{packed.name} is stored as {packed.dtype}"
        what = evidence if declared is None else f"{_describe(declared)}; {evidence}"
    elif declared is not None and _method(declared) not in _ALWAYS_PACKED:
        what = f"{_describe(declared)}, by its config"
    else:
        return
    raise Unsupported(
        f"the source is already quantized ({what}), so it cannot be a baseline, and quantizing it again would only add "
        "errors: use the 16-bit model that it was made from"
    )


def stale_quantization(config: Mapping[str, Any], headers: Sequence[Header]) -> str | None:
    """What the config says of a quantization that the tensors do not have (any more), as in a merged QLoRA; else None.

    Such an entry is ignored. Only for a source that ``refuse_quantized`` accepts.
    """
    declared = _declared(config)
    if declared is None or next(_packed(headers, is_declared=True), None) is not None:
        return None
    return None if _method(declared) not in _ALWAYS_PACKED else f"{_describe(declared)}, but no tensor is packed"


def declares_quantization(config: Mapping[str, Any]) -> bool:
    return _declared(config) is not None


def _declared(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization that the config, or a config nested in it, speaks of."""
    for holder in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in QUANTIZATION_KEYS:
            if (settings := holder.get(key)) and not isinstance(settings, Mapping):
                raise SourceCorrupt(f"config.json: {key} is not an object")
            if settings:
                return {"quant_method": key} | dict(settings)
    return None


def _method(settings: Mapping[str, Any]) -> str:
    """The name of the method. Configs of old versions of transformers with bitsandbytes do not name it."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(settings["quant_method"])


def _describe(settings: Mapping[str, Any]) -> str:
    """``bitsandbytes 4 bits (nf4)``, ``gptq 4 bits``"""
    method = _method(settings)
    family = family_of(method)
    if family is not None:
        return family.describe(settings)
    bits = settings.get("bits", settings.get("w_bit"))
    return f"{method} {bits} bits" if isinstance(bits, int) else method


def _packed(headers: Sequence[Header], *, is_declared: bool) -> Iterator[TensorInfo]:
    return (tensor for header in headers for tensor in header.tensors if _is_packed(tensor, is_declared=is_declared))


def _is_packed(tensor: TensorInfo, *, is_declared: bool) -> bool:
    if tensor.dtype in _NARROW_FLOATS or tensor.name.endswith(_SUFFIXES):
        return True
    if len(tensor.shape) < 2:
        return False
    if tensor.name.endswith(".weight"):  # transformers would interpret the codes as its values
        return tensor.dtype in _WHOLE_NUMBERS
    return is_declared and tensor.dtype in _CODES
