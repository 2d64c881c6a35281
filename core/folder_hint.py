"""What a folder without a model holds instead, or a file is, and which entry of a list would be right."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from qbatch.core.adapter_names import ADAPTER_CONFIG

MODULES_NAME = "modules.json"
_MAX_BYTES = 2**20
# How many entries of a folder are looked at, which may have millions.
_MOST_ENTRIES = 1000
_MOST_NAMED = 3
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")
_GGUF = "GGUF, which qbatch does not read; use the model in safetensors that it was made from"


def where_the_model_is(folder: Path) -> str:
    """The end of a message that says that ``folder`` has no model: ``: it is …; list … instead``, or nothing."""
    if (folder / ADAPTER_CONFIG).is_file():
        return f": {adapter_of(_read(folder / ADAPTER_CONFIG))}"
    inner = next((name for name in module_names(_read(folder / MODULES_NAME)) if _has_config(folder / name)), None)
    if inner is not None:
        return f": {inner_model(f'{folder}/{inner}')}"
    entries = _entries(folder)
    if any(entry.name.endswith(".gguf") for entry in entries):
        return f": it holds {_GGUF}"
    models = [entry.name for entry in entries if entry.is_dir() and _has_config(Path(entry.path))]
    return f": {_models_within(sorted(models))}" if models else ""


def not_a_folder(name: str) -> str:
    """What to do with the file ``name``, which stands where a model should."""
    if name.endswith(".gguf"):
        return f"{name} is {_GGUF}"
    if name.endswith(_WEIGHTS):
        return f"{name} is a file; name the folder of its model: {Path(name).parent}"
    return f"{name} is a file, not the folder of a model; a list of models is read with --models {name}"


def adapter_of(config: Any) -> str:
    """What to do with an adapter that has this config (None if it is not known)."""
    base = config.get("base_model_name_or_path") if isinstance(config, Mapping) else None
    of_base = f" for {base}" if isinstance(base, str) and base else ""
    return f"it is an adapter{of_base}, not a model; list the model that it is merged into (PEFT's merge_and_unload)"


def inner_model(path: str) -> str:
    return f"the model of this sentence-transformers folder is in {path}: list that one"


def module_names(modules: Any) -> Iterator[str]:
    """The folders that the content of a sentence-transformers model's modules.json lists."""
    entries = modules if isinstance(modules, list) else []
    names = [str(entry.get("path")) for entry in entries if isinstance(entry, Mapping)]
    yield from (name for name in names if re.fullmatch(r"[A-Za-z0-9_-]+", name))


def _models_within(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"it holds folders that have one: {', '.join(names[:_MOST_NAMED])}{more}; list these"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(islice(entries, _MOST_ENTRIES))
    except OSError:  # it is read only to give a hint
        return []


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _read(path: Path) -> Any:
    """The JSON in ``path``; None where it is not there or broken, since it is read only to give a hint."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        raw = file.read(_MAX_BYTES)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
