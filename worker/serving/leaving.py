"""The reason for which a worker decided to stop by itself."""

from __future__ import annotations

from qbatch.core.errors import WrongDatabase


class Leaving:
    """Set by any thread that finds the database unusable for good; checked before new work begins."""

    def __init__(self) -> None:
        self._why: WrongDatabase | None = None

    @property
    def why(self) -> WrongDatabase | None:
        """The reason, or None while the worker keeps working."""
        return self._why

    def because(self, error: WrongDatabase) -> None:
        """Set the reason. If one is already set, it is kept."""
        self._why = self._why or error
