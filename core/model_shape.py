"""What decides how fast a model runs, whatever the values of its weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qbatch.core.domain import content_hash
from qbatch.core.model_files import names_code
from qbatch.core.sources import read_config, read_headers, read_object

# What a config says of where it came from.
_ORIGIN = ("_name_or_path", "transformers_version", "_commit_hash")
# A config with one of these words in the name of a field that is set computes what depends on the values.
_CHOOSING = ("expert", "moe", "early_exit")


def shape_of(folder: Path) -> str | None:
    """A hash of the model's headers, config and generation config; None if its speed may depend on its weights' values.

    That is the case for mixtures, which choose their experts by value, and not known of a model with code of its own.
    Raises what ``read_headers`` raises.
    """
    config, headers = read_config(folder), read_headers(folder)
    tensors = {tensor.name: [tensor.dtype, *tensor.shape] for header in headers for tensor in header.tensors}
    if names_code(folder) or _chooses(config) or any("expert" in name for name in tensors):
        return None
    generation = folder / "generation_config.json"
    return content_hash(
        {
            "tensors": tensors,
            "config": _without_origin(config),
            "generation": _without_origin(read_object(generation)) if generation.is_file() else None,
        }
    )


def _without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _ORIGIN}


def _chooses(config: Mapping[str, Any]) -> bool:
    return any(value and any(word in name for word in _CHOOSING) for name, value in _fields(config))


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from _fields(value)
