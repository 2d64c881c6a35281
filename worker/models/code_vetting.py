"""Whether a model needs code that may not run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbatch.core.errors import SourceCorrupt, UnsafeSource, Unsupported
from qbatch.core.model_files import auto_map, names_code
from qbatch.worker.models.architecture import load_config, load_tokenizer, model_class
from qbatch.worker.models.load import translated

_TOKENIZER_CONFIG = "tokenizer_config.json"


def vet_code(folder: Path, *, trusted: bool) -> None:
    """Raises UnsafeSource for a model that needs code which may not run: its own unless ``trusted``, another
    repository's in any case. Of one that names code, SourceCorrupt or Unsupported where it cannot be told."""
    if not names_code(folder):
        return
    if trusted:
        _refuse_foreign_code(folder)
        return
    # Only transformers knows whether it has classes of its own for the model: then the model's are left alone.
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
