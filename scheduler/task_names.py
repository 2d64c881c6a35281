"""Which tasks the installed lm-evaluation-harness has, read from its files: its own registry takes 10 s to build."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

_TOKEN = re.compile(rb"[\w.+()-]+")


def unknown_tasks(names: Collection[str]) -> list[str]:
    """The ``names`` that no file of the harness mentions, so that it certainly has no such task. Empty if the harness
    is not installed here."""
    folder = _tasks_folder()
    left = {name.encode() for name in names}
    for path in _files(folder, names) if folder is not None and left else ():
        content = path.read_bytes()
        if any(name in content for name in left):
            left.difference_update(_TOKEN.findall(content))
        if not left:
            return []
    return [] if folder is None else [name for name in names if name.encode() in left]


def _tasks_folder() -> Path | None:
    spec = find_spec("lm_eval")
    folder = Path(spec.origin).parent / "tasks" if spec is not None and spec.origin is not None else None
    return folder if folder is not None and folder.is_dir() else None


def _files(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """All files that may define a task. First those in folders whose names are like those of the tasks."""

    def is_likely(path: Path) -> bool:
        return any(name.startswith(path.name) for name in names)

    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    for top in sorted(folders, key=is_likely, reverse=True):
        for at, _, files in os.walk(top):
            yield from (Path(at, file) for file in sorted(files) if file.endswith((".yaml", ".yml")) or "." not in file)
