"""How far the stage of a running job has come: written by its worker into the job's row, read by whoever watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """All fields are None if they are not known, or do not apply.

    The bytes are those of the last stage that moved any, fetching or quantizing, and ``bytes_total`` is the sum of what
    is to be read and written; ``bytes_per_s`` is the mean of the stage so far. ``step`` says in words what is measured.
    """

    bytes_read: int | None = None
    bytes_written: int | None = None
    bytes_total: int | None = None
    bytes_per_s: float | None = None
    step: str | None = None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | None) -> Self:
        """Workers of other versions may store less, or more."""
        stored = stored or {}
        return cls(**{name: stored.get(name) for name in cls.__slots__})

    def to_json(self) -> dict[str, Any]:
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}

    @property
    def bytes_moved(self) -> int | None:
        return None if self.bytes_read is None else self.bytes_read + (self.bytes_written or 0)
