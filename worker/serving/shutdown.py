"""The reason for which a worker decided to stop by itself."""

from __future__ import annotations

from qbatch.core.errors import WrongDatabase


class Shutdown:
    """Set by any thread that finds the database unusable for good; checked before new work begins."""

    def __init__(self) -> None:
        self._reason: WrongDatabase | None = None

    @property
    def reason(self) -> WrongDatabase | None:
        """The reason, or None while the worker keeps working."""
        return self._reason

    def request(self, error: WrongDatabase) -> None:
        """Set the reason. If one is already set, it is kept."""
        self._reason = self._reason or error
