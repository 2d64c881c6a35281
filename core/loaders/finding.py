"""One thing that a loader does with a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from qbatch.core.measured.loader_judgement import LoaderVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``is_chosen``: other options of ``submit`` would have avoided it. One that LOADS is a remark."""

    verdict: LoaderVerdict
    reason: str
    advice: str | None = None
    is_chosen: bool = False
