"""Copy the files of a source that a checkpoint needs besides its weights: tokenizer, templates, documents, modules."""

from __future__ import annotations

import shutil
from pathlib import Path

from qbatch.core.byte_units import GIB, mib
from qbatch.core.errors import Unsupported
from qbatch.core.model_files import python_files, sidecars

# The largest tokenizers take 50 MB, the dense layers of the largest embedding models a few hundred.
MOST_BYTES = GIB


def sidecar_bytes(source: Path, *, with_code: bool = False) -> int:
    """The size of the files that a checkpoint of ``source`` needs besides its weights, plus Python files ``with_code``.

    Raises Unsupported if they exceed MOST_BYTES, or OSError.
    """
    paths = {*sidecars(source), *(python_files(source) if with_code else ())}
    sizes: dict[Path, int] = {path: path.stat().st_size for path in paths}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise Unsupported(
            f"the files next to the weights take {mib(total)}, more than the {mib(MOST_BYTES)} that a checkpoint may "
            f"copy (the largest is {largest.relative_to(source)}, {mib(sizes[largest])}): move files that the model "
            "does not need to another folder"
        )
    return total


def copy_sidecars(source: Path, folder: Path) -> None:
    """Copy the files. Raises Unsupported if they exceed MOST_BYTES by now, or OSError."""
    sidecar_bytes(source)
    for path in sorted(sidecars(source)):
        target = folder / path.relative_to(source)
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
