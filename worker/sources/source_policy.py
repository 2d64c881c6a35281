"""Which sources are accepted: apart from what fetches them, because whoever gives the order imports only this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePolicy:
    """Which sources are accepted.

    ``roots`` are the folders that a source may be in; None allows any. ``trusted`` are the models (hub ids, absolute
    folders) whose own code may run. ``allow_pickle`` allows the conversion of pickles.
    """

    roots: tuple[Path, ...] | None
    trusted: frozenset[str] = frozenset()
    allow_pickle: bool = False
