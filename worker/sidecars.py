"""What of a source is copied beside a checkpoint's weights: tokenizer, templates, documents, modules. And how much."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from models_db.errors import Unsupported
from models_db.sources import DOCUMENTS, SIDECARS
from models_db.storage import MANIFEST
from worker.remote_code import python_files

# The largest tokenizers take 50 MB, the dense layers of the largest embedding models a few hundred.
MOST_BYTES = 2**30
# Pickles, Python files and other frameworks' weights are left behind.
_SIDECARS = (*SIDECARS, *DOCUMENTS)
_NOT_SIDECARS = ("config.json", MANIFEST, "*.index.json")


def sidecar_bytes(source: Path, *, with_code: bool = False) -> int:
    """What a checkpoint of ``source`` will hold beside its weights, its Python files among it ``with_code``.

    Raises Unsupported where that is more than a checkpoint takes along; OSError.
    """
    paths = {*_sidecars(source), *(python_files(source) if with_code else ())}
    sizes: dict[Path, int] = {path: path.stat().st_size for path in paths}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise Unsupported(
            f"the files beside the weights take {_mib(total)}, and a checkpoint takes at most {_mib(MOST_BYTES)} of "
            f"them along (the largest is {largest.relative_to(source)}, {_mib(sizes[largest])}): move what the model "
            "does not need to another folder"
        )
    return total


def copy_sidecars(source: Path, folder: Path) -> None:
    """Raises Unsupported as ``sidecar_bytes`` does, should they have grown since it was asked; OSError."""
    sidecar_bytes(source)
    for path in sorted(_sidecars(source)):
        target = folder / path.relative_to(source)
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _sidecars(source: Path) -> Iterator[Path]:
    found = {path for pattern in _SIDECARS for path in source.glob(pattern) if path.is_file()}
    yield from found.difference(*(source.glob(pattern) for pattern in _NOT_SIDECARS))
    for module in _module_folders(source):
        yield from (path for path in module.rglob("*") if path.is_file() and _is_module_file(path))


def _module_folders(source: Path) -> Iterable[Path]:
    """The folders of a sentence-transformers model (pooling, normalization, dense) that modules.json names."""
    try:
        modules = json.loads((source / "modules.json").read_text())
    except (FileNotFoundError, ValueError):  # a file of that name that is another library's is copied, no more
        return []
    entries = modules if isinstance(modules, list) else []
    names = [str(entry.get("path")) for entry in entries if isinstance(entry, dict)]
    return [source / name for name in names if re.fullmatch(r"[A-Za-z0-9_-]+", name) and (source / name).is_dir()]


def _is_module_file(path: Path) -> bool:
    return path.suffix in (".json", ".safetensors", ".txt")


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
