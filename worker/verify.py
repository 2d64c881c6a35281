"""Whether a published checkpoint is still what was published, and is what its config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models_db.errors import JobError
from models_db.sources import read_headers
from worker.checkpoint import problems


def verify(folder: Path) -> list[str]:
    """What is wrong with the checkpoint in ``folder``, one line each; empty for a sound one.

    First every file against the manifest; if those match, the tensors against the config: transformers' own loader,
    on the CPU, must miss none, have none left over, and find every shape right. That takes the checkpoint's size in
    host memory.
    """
    if not folder.is_dir():
        return ["no such folder"]
    return problems(folder) or _header_problems(folder) or _tensor_problems(folder)


def _header_problems(folder: Path) -> list[str]:
    try:
        read_headers(folder)
    except JobError as error:
        return [str(error)]
    return []


def _tensor_problems(folder: Path) -> list[str]:
    import torch
    from transformers import AutoConfig

    from worker.architecture import model_class
    from worker.load import quiet_libraries

    quiet_libraries(with_bitsandbytes=True)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.no_grad():
            _, found = model_class(config).from_pretrained(
                folder, config=config, device_map={"": "cpu"}, output_loading_info=True, local_files_only=True
            )
    except (JobError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        lines = str(error).strip().splitlines() or [""]
        return [f"transformers cannot load it: {type(error).__name__}: {lines[0]}"]
    return [
        f"{name}: {what}"
        for key, what in (
            ("missing_keys", "in the config's model and not in the files"),
            ("unexpected_keys", "in the files and not in the config's model"),
            ("mismatched_keys", "of another shape than the config's"),
        )
        for name in sorted(_name(entry) for entry in found.get(key, ()))
    ]


def _name(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry[0])
