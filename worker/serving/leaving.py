"""Why a worker takes no more jobs and leaves, though nobody told it to stop."""

from __future__ import annotations

from qbatch.core.errors import WrongDatabase


class Leaving:
    """Said by whoever meets a database that is not to be worked on; heard by those who would begin something new."""

    def __init__(self) -> None:
        self._why: WrongDatabase | None = None

    @property
    def why(self) -> WrongDatabase | None:
        """None as long as the worker stays."""
        return self._why

    def because(self, error: WrongDatabase) -> None:
        """The first reason stands."""
        self._why = self._why or error
