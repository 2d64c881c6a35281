"""Looks at all that waits for a queue, where most of what waits belongs in another one.

That takes a tenth of a second for tens of thousands of jobs. So it is done apart from the transaction that marks what
is sent, in which on SQLite nobody else could write, and for at most a tenth of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from qbatch.models_db.ready_bundles import ReadyBundles

_SHARE_OF_TIME = 0.1

Place = tuple[str, int]
"""A queue and a priority."""


@dataclass(slots=True)
class BacklogLooks:
    """Which looks are wanted, and what they found: the names of ready bundles by batch, in the order of submission."""

    clock: Callable[[], float] = time.monotonic
    _wanted: dict[Place, tuple[ReadyBundles, int]] = field(default_factory=dict)
    _found: dict[Place, Mapping[int, Sequence[str]]] = field(default_factory=dict)
    _not_before: dict[Place, float] = field(default_factory=dict)

    @property
    def are_wanted(self) -> bool:
        return bool(self._wanted)

    def take_found(self, place: Place) -> Mapping[int, Sequence[str]] | None:
        """What the last look found; None if there was none since this was last asked."""
        return self._found.pop(place, None)

    def want(self, place: Place, ready: ReadyBundles, most: int) -> None:
        """Ask for a look for ``most`` bundles of each batch, unless the last one was a short time ago."""
        if self.clock() >= self._not_before.get(place, 0.0):
            self._wanted[place] = (ready, most)

    def look(self, session: Session) -> bool:
        """Make the looks that are wanted. Returns whether anything was found."""
        wanted, self._wanted = self._wanted, {}
        for place, (ready, most) in wanted.items():
            began = self.clock()
            self._found[place] = ready.of_each_batch(session, place[1], most)
            ended = self.clock()
            self._not_before[place] = ended + (ended - began) / _SHARE_OF_TIME
        return any(self._found[place] for place in wanted)
