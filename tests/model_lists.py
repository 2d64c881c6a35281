"""Reading a list of models of which every line must be one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from qbatch.core.domain import SourceRef
from qbatch.core.errors import ModelsRefused
from qbatch.scheduler.model_list import read_models


def read_model_list(
    lines: Iterable[str], *, named: Iterable[str] = (), check_folders: bool, roots: Sequence[Path] | None
) -> list[SourceRef]:
    """The models of ``read_models``. Raises ModelsRefused if there are problems."""
    listed = read_models(lines, named=named, check_folders=check_folders, roots=roots)
    if listed.problems:
        raise ModelsRefused(list(map(str, listed.problems)), models=len(listed.sources) + len(listed.problems))
    return list(listed.sources)
