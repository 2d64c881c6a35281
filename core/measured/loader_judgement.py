"""What a loader makes of a checkpoint, judged from its config, headers and names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qbatch.core.stored_json import Stored


class LoaderVerdict(StrEnum):
    """From the best to the worst."""

    LOADS = "loads"
    UNKNOWN = "not known"
    DIFFERS = "loads otherwise than measured"
    REFUSES = "refuses"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderJudgement(Stored):
    """``version`` is that of the loader whose source was read, ``read_on`` when. ``reasons`` are sentences, ``advice``
    what to do instead."""

    verdict: str | None = None
    version: str | None = None
    read_on: str | None = None
    reasons: tuple[str, ...] | None = None
    advice: tuple[str, ...] | None = None
