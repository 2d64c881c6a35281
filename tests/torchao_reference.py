"""What a user would do with torchao without qbatch, and how its files are compared with ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, TorchAoConfig

from qbatch.core.domain import DType, Method, Scheme


def reference(
    source: Path, folder: Path, scheme: Scheme, dtype: DType, skips: list[str] | None = None, device: str = "cpu"
) -> Path:
    """The checkpoint that ``save_pretrained`` writes, with the library's own defaults."""
    (architecture,) = AutoConfig.from_pretrained(source).architectures
    limit = {} if scheme.max_shard_bytes is None else {"max_shard_size": scheme.max_shard_bytes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, architecture).from_pretrained(
            source,
            quantization_config=TorchAoConfig(_own(scheme), modules_to_not_convert=skips),
            dtype=getattr(torch, dtype.value),
            device_map={"": device},
        )
        model.save_pretrained(folder, **limit)
    return folder


def _own(scheme: Scheme) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    if scheme.method is Method.TORCHAO_INT8_DYNAMIC:
        return Int8DynamicActivationInt8WeightConfig()
    if scheme.method is Method.TORCHAO_INT8:
        return Int8WeightOnlyConfig()
    group_size = scheme.options["group_size"]
    return Int4WeightOnlyConfig(group_size=group_size, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)


def contents(folder: Path) -> dict[str, Any]:
    """What is compared: of a weight file its header, whose metadata has no order, and its data byte for byte."""
    return {path.name: _content(path) for path in sorted(folder.iterdir())}


def _content(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return _without_inductor(json.loads(path.read_text()))
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return header, file.read()


def _without_inductor(config: dict[str, Any]) -> dict[str, Any]:
    """The one setting that is not the library's default: it says nothing of the weights."""
    if "quantization_config" in config:
        del config["quantization_config"]["quant_type"]["default"]["_data"]["set_inductor_config"]
    return config
