"""What a loader sees of a checkpoint before it reads a weight: its config and the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qbatch.core.adapter_names import ADAPTER_CONFIG
from qbatch.core.kinds import FLOATS
from qbatch.core.methods.registry import FAMILIES
from qbatch.core.sources import TensorInfo, read_config, read_headers
from qbatch.core.vocabulary import vocabulary_size

SKIP_LIST = "llm_int8_skip_modules"
"""The key of ``quantization_config`` under which it lists the layers left unquantized, whatever the method."""

_PACKED_PARTS = tuple(suffix for family in FAMILIES for suffix in family.packed_parts)
# Matrices that no loader takes for a linear layer: embeddings, output layers, a mixture's routers.
_NOT_LINEAR = re.compile(r"embed|(^|\.)(wte|wpe|shared|lm_head|output|gate|router|relative_attention_bias)$")


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """``packed`` are the quantized layers by their names in the files; ``kept`` the matrices of 16 or 32 bits that a
    loader may take for linear layers; ``experts`` those of a mixture, which transformers leaves at 16 bits."""

    config: Mapping[str, Any]
    packed: Set[str]
    kept: Set[str]
    experts: Set[str]
    has_adapter: bool = False

    @classmethod
    def of_tensors(
        cls, config: Mapping[str, Any], tensors: Iterable[TensorInfo], *, has_adapter: bool = False
    ) -> CheckpointFacts:
        known = list(tensors)
        vocabulary = vocabulary_size(config)
        packed = {module for tensor in known if (module := packed_module(tensor.name)) is not None}
        floats = {tensor.name.removesuffix(".weight") for tensor in known if _is_matrix(tensor, vocabulary)} - packed
        stacked = {tensor.name for tensor in known if len(tensor.shape) == 3 and _is_expert(tensor.name)}
        experts = {name for name in floats if _is_expert(name)} | stacked
        return cls(config=config, packed=packed, kept=floats - experts, experts=experts, has_adapter=has_adapter)

    @classmethod
    def of_folder(cls, folder: Path) -> CheckpointFacts:
        """Raises what ``read_headers`` and ``read_config`` raise."""
        tensors = (tensor for header in read_headers(folder) for tensor in header.tensors)
        return cls.of_tensors(read_config(folder), tensors, has_adapter=(folder / ADAPTER_CONFIG).exists())

    @cached_property
    def quantization(self) -> Mapping[str, Any]:
        value = self.config.get("quantization_config")
        return value if isinstance(value, Mapping) else {}

    @property
    def method(self) -> str | None:
        return self._text("quant_method")

    @property
    def is_int8(self) -> bool:
        return self.quantization.get("load_in_8bit") is True

    @property
    def storage(self) -> str:
        return self._text("bnb_4bit_quant_storage") or "uint8"

    @property
    def dtype(self) -> str:
        value = self.config.get("dtype")
        return value if isinstance(value, str) else "float32"

    @property
    def compute_dtype(self) -> str:
        return self._text("bnb_4bit_compute_dtype") or "float32"

    @property
    def skip_list(self) -> tuple[str, ...]:
        listed = self.quantization.get(SKIP_LIST)
        return tuple(one for one in listed if isinstance(one, str)) if isinstance(listed, list) else ()

    @property
    def architecture(self) -> str | None:
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None

    @property
    def needs_code(self) -> bool:
        return bool(self.config.get("auto_map"))

    def _text(self, key: str) -> str | None:
        value = self.quantization.get(key)
        return value if isinstance(value, str) else None


def packed_module(tensor: str) -> str | None:
    """The quantized layer that a tensor is a part of; None if it is of none."""
    return next((tensor.removesuffix(part) for part in _PACKED_PARTS if tensor.endswith(part)), None)


def _is_matrix(tensor: TensorInfo, vocabulary: int | None) -> bool:
    return (
        len(tensor.shape) == 2
        and tensor.dtype in FLOATS
        and tensor.name.endswith(".weight")
        and _NOT_LINEAR.search(tensor.name.removesuffix(".weight")) is None
        and vocabulary not in tensor.shape
    )


def _is_expert(name: str) -> bool:
    return ".experts." in name
