"""How often somebody who waits is told that there is nothing new: often at first, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

AT_FIRST_S = 5.0
LATER_S = 60.0
_FIRST_S = 300.0


class Cadence:
    """Asked now and then, it says when a line is due. A log of days must not fill with them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._spoke = clock()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began

    def spoke(self) -> None:
        """Something was said just now."""
        self._spoke = self._clock()

    def is_due(self) -> bool:
        """Whether nothing was said for too long."""
        most_s = AT_FIRST_S if self.elapsed_s < _FIRST_S else LATER_S
        return self._clock() - self._spoke >= most_s
