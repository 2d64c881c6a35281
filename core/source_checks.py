"""Checks that refuse a source before anything of it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbatch.core.config_plausibility import refuse_implausible_config
from qbatch.core.errors import SourceCorrupt, Unsupported
from qbatch.core.prior_quantization import refuse_quantized
from qbatch.core.sources import Header, read_config, read_headers, storage_errors

# transformers prefers such files to the model's own.
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def check_source(source: Path) -> tuple[Header, ...]:
    """Check an unquantized safetensors model, and return its headers.

    Raises SourceCorrupt, SourceNotFound, UnsafeSource (if it has only pickled weights), or Unsupported if the source is
    already quantized, or its config names other weight files or replaces modules.
    """
    config = read_config(source)
    _check_folder(source, config)
    headers = read_headers(source)
    _check_headers(config, headers)
    return headers


def check_contents(source: Path, config: Mapping[str, Any], headers: tuple[Header, ...]) -> None:
    """``check_source`` of a folder whose config and headers were read already."""
    _check_folder(source, config)
    _check_headers(config, headers)


def _check_folder(source: Path, config: Mapping[str, Any]) -> None:
    refuse_other_weights(config)
    _refuse_fusions(config)
    _refuse_distributed(source)


def _check_headers(config: Mapping[str, Any], headers: tuple[Header, ...]) -> None:
    refuse_quantized(config, headers)
    refuse_implausible_config(config, headers)
    _refuse_duplicates(headers)


def refuse_other_weights(config: Mapping[str, Any]) -> None:
    """Raise Unsupported if transformers would load files that were not checked, which might be pickles."""
    if config.get("transformers_weights") is not None:
        raise Unsupported("config.json names other weight files (transformers_weights)")


def _refuse_distributed(source: Path) -> None:
    """Raise Unsupported if transformers would load the files of a distributed checkpoint instead of those checked."""
    with storage_errors():
        names = sorted(path.name for path in source.iterdir() if _DISTRIBUTED.match(path.name))
    if names:
        raise Unsupported(f"{names[0]} is a part of a distributed checkpoint beside the weights: move it away")


def _refuse_fusions(config: Mapping[str, Any]) -> None:
    """Raise Unsupported if the config has a fusion_config: transformers would replace the modules that it names in the
    whole process, and convert their weights."""
    if config.get("fusion_config"):
        raise Unsupported("config.json replaces modules by fused ones (fusion_config)")


def _refuse_duplicates(headers: tuple[Header, ...]) -> None:
    seen: dict[str, Path] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in seen:
                raise SourceCorrupt(f"{tensor.name} is in {seen[tensor.name].name} and in {header.path.name}")
            seen[tensor.name] = header.path
