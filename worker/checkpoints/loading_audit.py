"""The audit's entry on where a checkpoint can be loaded, made before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qbatch.core.loaders.known_loaders import JUDGED_AT_PUBLISHING, judge_folder


def loading_audit(folder: Path) -> dict[str, Any]:
    """What each loader does with the checkpoint. Raises JobError if the files just written cannot be read."""
    judgements = judge_folder(folder, JUDGED_AT_PUBLISHING)
    return {"loaders": {name: judgement.to_json() for name, judgement in judgements.items()}}
