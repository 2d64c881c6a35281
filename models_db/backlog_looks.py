"""Looks at all that waits for a queue, where most of what waits belongs in another one.

That takes a tenth of a second for tens of thousands of jobs. So it is done apart from the transaction that marks what
is sent, in which on SQLite nobody else could write, and at each place for at most a tenth of the time.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """For ``most`` bundles of each batch."""

    place: Place
    ready: ReadyBundles
    most: int


@dataclass(slots=True)
class BacklogLooks:
    """Which look is wanted, and what those of a round found: the names of ready bundles by batch, in the order of
    submission.

    In a round each place is looked at once, so that one of which much is asked does not keep the others waiting.
    """

    clock: Callable[[], float] = time.monotonic
    _wanted: _Look | None = None
    # None for what was taken.
    _found: dict[Place, Mapping[int, Sequence[str]] | None] = field(default_factory=dict)
    _not_before: dict[Place, float] = field(default_factory=dict)

    @property
    def is_wanted(self) -> bool:
        return self._wanted is not None

    def take_found(self, place: Place) -> Mapping[int, Sequence[str]] | None:
        """What the look of this round found there; None if there was none, or if this was asked before."""
        found = self._found.get(place)
        if found is not None:
            self._found[place] = None
        return found

    def want(self, place: Place, ready: ReadyBundles, most: int) -> None:
        """Ask for a look for ``most`` bundles of each batch, unless there was one in this round or a short time ago."""
        if place not in self._found and self.clock() >= self._not_before.get(place, 0.0):
            self._wanted = _Look(place=place, ready=ready, most=most)

    def look(self, session: Session) -> None:
        """Make the look that is wanted, if one is."""
        if self._wanted is None:
            return
        wanted, self._wanted = self._wanted, None
        began = self.clock()
        self._found[wanted.place] = wanted.ready.of_each_batch(session, wanted.place[1], wanted.most)
        ended = self.clock()
        self._not_before[wanted.place] = ended + (ended - began) / _SHARE_OF_TIME

    def end_round(self) -> None:
        self._found.clear()
