"""Checks that refuse a source before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbatch.core.errors import SourceCorrupt, Unsupported
from qbatch.core.sources import Header, TensorInfo, read_config, read_headers
from qbatch.worker.models.config_plausibility import refuse_implausible_config

# Suffixes of tensors that quantizers of all kinds store with or instead of a weight.
_QUANTIZED_SUFFIXES = (
    ".SCB",
    ".absmax",
    ".quant_map",
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
)
_NARROW_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2")
_WHOLE_NUMBERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


def vet_source(source: Path) -> tuple[Header, ...]:
    """Check an unquantized safetensors model, and return its headers.

    Raises SourceCorrupt, SourceNotFound, UnsafeSource (if it has only pickled weights), or Unsupported if the source is
    already quantized, or its config names other weight files or replaces modules.
    """
    config = read_config(source)
    _refuse_quantized_config(config)
    refuse_other_weights(config)
    _refuse_fusions(config)
    headers = read_headers(source)
    refuse_implausible_config(config, headers)
    _refuse_quantized_tensors(headers)
    _refuse_duplicates(headers)
    return headers


def refuse_other_weights(config: Mapping[str, Any]) -> None:
    """Raise Unsupported if transformers would load files that were not checked, which might be pickles."""
    if config.get("transformers_weights") is not None:
        raise Unsupported("config.json names other weight files (transformers_weights)")


def _refuse_fusions(config: Mapping[str, Any]) -> None:
    """Raise Unsupported if the config has a fusion_config: transformers would replace the modules that it names in the
    whole process, and convert their weights."""
    if config.get("fusion_config"):
        raise Unsupported("config.json replaces modules by fused ones (fusion_config)")


def _refuse_quantized_config(config: Mapping[str, Any]) -> None:
    for holder in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if quantization := holder.get(key):
                method = quantization.get("quant_method") if isinstance(quantization, dict) else None
                raise Unsupported(f"the source is already quantized ({method or key})")


def _refuse_quantized_tensors(headers: tuple[Header, ...]) -> None:
    for header in headers:
        for tensor in header.tensors:
            if tensor.dtype in _NARROW_FLOATS or tensor.name.endswith(_QUANTIZED_SUFFIXES) or _is_codes(tensor):
                raise Unsupported(f"the source is already quantized: {tensor.name} ({tensor.dtype})")


def _is_codes(tensor: TensorInfo) -> bool:
    """Whether a weight consists of integers, which transformers would interpret as its values."""
    return tensor.name.endswith(".weight") and len(tensor.shape) > 1 and tensor.dtype in _WHOLE_NUMBERS


def _refuse_duplicates(headers: tuple[Header, ...]) -> None:
    seen: dict[str, Path] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in seen:
                raise SourceCorrupt(f"{tensor.name} is in {seen[tensor.name].name} and in {header.path.name}")
            seen[tensor.name] = header.path
