"""Code that a model brings with it: its checksum, and its copy beside a checkpoint. Imports neither torch nor
transformers."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from qbatch.core.model_files import python_files
from qbatch.worker.files.staging import storage_error

REFUSAL = "the model needs code of its own, which runs only where QBATCH_TRUST_REMOTE_CODE names it"


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
