"""What a user would do without qbatch: ``from_pretrained(quantization_config=…)`` and ``save_pretrained``."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, BitsAndBytesConfig

from qbatch.core.domain import DType, Method, Scheme


def save_reference(
    source: Path, folder: Path, scheme: Scheme, dtype: DType, *, device: str = "cpu", skips: list[str] | None = None
) -> Path:
    """Write the reference checkpoint of ``source`` to ``folder``. ``skips`` is transformers' whole skip list."""
    limit = {} if scheme.max_shard_bytes is None else {"max_shard_size": scheme.max_shard_bytes}
    load_quantized(source, scheme, dtype, device=device, skips=skips).save_pretrained(folder, **limit)
    return folder


def load_quantized(
    source: Path, scheme: Scheme, dtype: DType, *, device: str = "cpu", skips: list[str] | None = None
) -> Any:
    """The quantized model in memory. The config is that of its type, as the auto classes pass it on: some types name a
    class of another type, whose own ``from_pretrained`` would turn the config into one of that type."""
    config = AutoConfig.from_pretrained(source)
    (architecture,) = config.architectures
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, architecture).from_pretrained(
            source,
            config=config,
            quantization_config=_quantization_config(scheme, skips),
            dtype=getattr(torch, dtype.value),
            device_map={"": device},
        )


def _quantization_config(scheme: Scheme, skips: list[str] | None) -> BitsAndBytesConfig:
    if scheme.method is Method.INT8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=scheme.options["int8_threshold"], llm_int8_skip_modules=skips
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme.method.value.removeprefix("bnb-"),
        bnb_4bit_use_double_quant=scheme.options["double_quant"],
        bnb_4bit_compute_dtype=scheme.compute_dtype.value,
        bnb_4bit_quant_storage=scheme.options["quant_storage"],
        llm_int8_skip_modules=skips,
    )


def contents(folder: Path) -> dict[str, Any]:
    """What is compared: the sha256 of each file by name, and a configuration's JSON."""
    return {
        path.name: json.loads(path.read_text())
        if path.name in ("config.json", "generation_config.json")
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
    }
