"""Code that a model brings with it: whether it names some, and how it is loaded where the worker's settings trust it.
Importing this imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models_db.content import auto_map, names_code, python_files
from models_db.errors import SourceCorrupt, UnsafeSource, Unsupported
from worker.staging import storage_error

REFUSAL = "the model needs code of its own, which runs only where QBATCH_TRUST_REMOTE_CODE names it"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def code_sha256(folder: Path) -> str:
    """One sha256 (hex) over the Python files of a model."""
    digest = hashlib.sha256()
    for path in python_files(folder):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def copy_code(source: Path, checkpoint: Path) -> None:
    """Give a checkpoint the Python files that its config names; those that transformers copied stay.

    Raises DiskFull or StorageError.
    """
    try:
        for path in python_files(source):
            target = checkpoint / path.relative_to(source)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    except OSError as error:
        raise storage_error(error, "cannot copy the model's code") from error


def vet_code(folder: Path, *, trusted: bool) -> None:
    """Raises UnsafeSource for a model that needs code which may not run: its own unless ``trusted``, another
    repository's in any case. Of one that names code, SourceCorrupt or Unsupported where it cannot be told."""
    if not names_code(folder):
        return
    if trusted:
        _refuse_foreign_code(folder)
        return
    # Only transformers knows whether it has classes of its own for the model: then the model's are left alone.
    from worker.architecture import load_config, load_tokenizer, model_class
    from worker.load import translated

    with translated(Unsupported, f"cannot tell whether {folder.name} needs code of its own"):
        model_class(load_config(folder, trusted=False))
        load_tokenizer(folder, trusted=False)


def _refuse_foreign_code(folder: Path) -> None:
    for path in (folder / "config.json", folder / _TOKENIZER_CONFIG):
        for reference in _references(auto_map(path)):
            if "--" in reference:
                raise UnsafeSource(f"{path.name} names code of another repository, which is never run")


def _references(named: Any) -> list[str]:
    """Every class that it names: a string, or a pair of them for a tokenizer's two."""
    values = named.values() if isinstance(named, Mapping) else [named]
    found = [item for value in values for item in (value if isinstance(value, list) else [value]) if item is not None]
    if not all(isinstance(item, str) for item in found):
        raise SourceCorrupt("auto_map names no classes")
    return found
