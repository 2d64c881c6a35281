"""Which files belong to a model: those that affect what it computes or what is published with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qbatch.core.adapter_names import ADAPTER_CONFIG
from qbatch.core.folder_hint import MODULES_NAME, module_names
from qbatch.core.lfs_pointer import refuse_lfs_pointer
from qbatch.core.manifest import MANIFEST
from qbatch.core.sources import (
    DOCUMENTS,
    INDEX_NAME,
    MAX_HEADER_BYTES,
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    SIDECARS,
    SINGLE_NAME,
    is_pickled,
    pickle_files,
    read_object,
    require_config,
    storage_errors,
    weight_files,
)
from qbatch.core.storage import MODEL_CARD

# With PEFT installed, transformers would apply an adapter that it finds beside the weights. It is neither loaded nor
# published, so it does not belong to the model.
_NOT_BESIDE = ("config.json", MANIFEST, "*.index.json", ADAPTER_CONFIG)


def content_files(folder: Path, *, with_code: bool = False, allow_pickle: bool = False) -> dict[str, Path]:
    """The files of the model in ``folder``, by their path relative to it.

    These are the config, the weights with their index, the files next to them (see ``sidecars``), and, if
    ``with_code``, the Python files.

    Raises SourceNotFound, SourceCorrupt, UnsafeSource for pickles that are not allowed, or StorageError.
    """
    with storage_errors():
        require_config(folder)
        pickled = allow_pickle and is_pickled(folder)
        weights = pickle_files(folder) if pickled else weight_files(folder)
        single, index = (PICKLE_NAME, PICKLE_INDEX_NAME) if pickled else (SINGLE_NAME, INDEX_NAME)
        paths = {folder / "config.json", *weights, *sidecars(folder)} - {folder / MODEL_CARD}
        if not (folder / single).is_file():
            paths.add(folder / index)
        if with_code:
            paths |= set(python_files(folder))
        for path in sorted(paths):
            refuse_lfs_pointer(path)
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths)}


def sidecars(folder: Path) -> set[Path]:
    """The files that a user needs besides the weights. Raises OSError.

    These are the tokenizer, templates, documents, and the module files of a sentence-transformers model. Pickles,
    Python files and the weights of other frameworks are not included.
    """
    files = {path for pattern in (*SIDECARS, *DOCUMENTS) for path in folder.glob(pattern) if path.is_file()}
    files -= {path for pattern in _NOT_BESIDE for path in folder.glob(pattern)}
    for module in _module_folders(folder):
        files |= {path for path in module.rglob("*") if path.is_file() and _is_module_file(path)}
    return files


def names_code(folder: Path) -> bool:
    """Whether a config of the model in ``folder`` refers to classes of its own. Raises SourceCorrupt."""
    return any(auto_map(folder / name) for name in ("config.json", "tokenizer_config.json"))


def auto_map(path: Path) -> Any:
    """The ``auto_map`` of a config file, which names the model's own classes; None if absent. Raises SourceCorrupt."""
    return read_object(path).get("auto_map") if path.is_file() else None


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if path.is_file())


def _module_folders(folder: Path) -> Iterator[Path]:
    """The module folders (pooling, normalization, dense) that modules.json of a sentence-transformers model lists."""
    path = folder / MODULES_NAME
    if not path.is_file():
        return
    with path.open("rb") as file:
        raw = file.read(MAX_HEADER_BYTES)
    try:
        modules = json.loads(raw)
    except (ValueError, RecursionError):  # another library may use this file name; the file itself is still copied
        return
    yield from (folder / name for name in module_names(modules) if (folder / name).is_dir())


def _is_module_file(path: Path) -> bool:
    return path.suffix in (".json", ".safetensors", ".txt")
