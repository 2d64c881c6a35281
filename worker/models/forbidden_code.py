"""Refuses models that need code which is not allowed to run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbatch.core.errors import SourceCorrupt, UnsafeSource, Unsupported
from qbatch.core.model_files import auto_map, names_code
from qbatch.worker.models.architecture import load_config, model_class
from qbatch.worker.models.load import translated
from qbatch.worker.models.tokenizer import TOKENIZER_CONFIG, load_tokenizer


def refuse_forbidden_code(folder: Path, *, trusted: bool) -> None:
    """Raise UnsafeSource if the model needs code that is not allowed to run: its own code unless ``trusted``, or code
    of another repository in any case.

    Raises SourceCorrupt or Unsupported if the model names code, but cannot be checked.
    """
    if not names_code(folder):
        return
    if trusted:
        _refuse_foreign_code(folder)
        return
    # If transformers has its own classes for the model, the model's code is not used. Only transformers knows that.
    with translated(Unsupported, f"cannot determine whether {folder.name} needs code of its own"):
        model_class(load_config(folder, trusted=False))
        load_tokenizer(folder, trusted=False)


def _refuse_foreign_code(folder: Path) -> None:
    for path in (folder / "config.json", folder / TOKENIZER_CONFIG):
        for reference in _references(auto_map(path)):
            if "--" in reference:
                raise UnsafeSource(f"{path.name} refers to code of another repository, which is never run")


def _references(named: Any) -> list[str]:
    """All class references in an ``auto_map``. Each entry is a string, or for tokenizers a list of two."""
    values = named.values() if isinstance(named, Mapping) else [named]
    classes = [item for value in values for item in (value if isinstance(value, list) else [value]) if item is not None]
    if not all(isinstance(item, str) for item in classes):
        raise SourceCorrupt("auto_map contains a value that is not a class name")
    return classes
