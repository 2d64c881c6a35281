"""Connections to a PostgreSQL server, of which it takes only so many (100 unless it is told otherwise).

At rest, a worker and a scheduler hold one each. One that is refused because all are taken tries again for a while, at
moments that differ from those of others.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import text
from sqlalchemy.orm import Session

T = TypeVar("T")

# A refused connection has no SQLSTATE in libpq. The last one is PgBouncer's.
_ALL_TAKEN = (
    "too many clients",
    "too many connections",
    "remaining connection slots are reserved",
    "no more connections allowed",
)
# About 12 s in all: less than half of the shortest time in which a worker must be heard of with the default settings.
_PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 3.0, 3.0)
ADVICE = "raise max_connections in its configuration"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionCount:
    """``used`` of the ``limit`` connections that the server gives to users without special rights."""

    used: int
    limit: int


def are_all_taken(error: BaseException | None) -> bool:
    """Whether a connection was refused because there were too many."""
    return any(words in str(error) for words in _ALL_TAKEN)


def connect_patiently(connect: Callable[[], T], error_type: type[Exception]) -> T:
    """Call ``connect`` until it is not refused for too many connections, or has been tried for about 12 s."""
    for pause_s in _PAUSES_S:
        try:
            return connect()
        except error_type as error:
            if not are_all_taken(error):
                raise
        time.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311
    return connect()


def count_connections(session: Session) -> ConnectionCount:
    """The connections to a PostgreSQL server. SQLite has none."""
    return ConnectionCount(**session.execute(_COUNT).mappings().one())


# Of other roles' sessions pg_stat_activity tells an ordinary role nothing, not even what kind they are.
_COUNT = text(
    """
    SELECT (SELECT sum(numbackends)::int FROM pg_stat_database) AS used,
           current_setting('max_connections')::int - sum(setting::int) AS "limit"
    FROM pg_settings WHERE name IN ('superuser_reserved_connections', 'reserved_connections')
    """
)
