"""How often to print a line while nothing changes: often at first, later once a minute."""

from __future__ import annotations

import time
from collections.abc import Callable

AT_FIRST_S = 5.0
LATER_S = 60.0
_FIRST_S = 300.0


class LineInterval:
    """Decides when the next line is due, so that the log of a job that takes days does not fill with them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._last_line = clock()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    def note_line(self) -> None:
        """Note that a line was printed just now."""
        self._last_line = self._clock()

    def is_due(self) -> bool:
        """Whether the last line was printed long enough ago."""
        interval_s = AT_FIRST_S if self.elapsed_s < _FIRST_S else LATER_S
        return self._clock() - self._last_line >= interval_s
