"""The Python code that comes with a model: its checksum, and its copy in a checkpoint. Imports neither torch nor
transformers."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from qbatch.core.model_files import python_files
from qbatch.worker.files.staging import storage_error

REFUSAL = "the model needs code of its own, which runs only if QBATCH_TRUST_REMOTE_CODE lists it"


def code_sha256(folder: Path) -> str:
    """The sha256 (hex) over all Python files of a model, with their paths and sizes."""
    digest = hashlib.sha256()
    for path in python_files(folder):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def copy_code(source: Path, checkpoint: Path) -> None:
    """Copy the source's Python files into a checkpoint, except those that transformers has already copied.

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
