"""How a transaction waits for SQLite's one lock for writing, and how one after another leaves it to others between."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
from collections.abc import Iterator

from sqlalchemy import Connection

_BEGIN = "BEGIN IMMEDIATE"
# The rest of an error code says which kind of busy it is.
_PRIMARY_CODE = 0xFF
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.02


def begin_writing(connection: Connection, wait_s: float) -> None:
    """Begin a transaction that may write, after waiting for the lock for at most ``wait_s``. Raises DBAPIError.

    SQLite's own way of waiting looks every 100 ms after a while. Among many writers, those who have just come are then
    served first again and again, and whoever waits longest is served last.
    """
    # The driver's: a refusal is expected here, and SQLAlchemy would take longer to wrap it than the pause is.
    driver: sqlite3.Connection = connection.connection.dbapi_connection  # type: ignore[assignment]
    deadline = time.monotonic() + wait_s
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        while time.monotonic() < deadline:
            try:
                driver.execute(_BEGIN)
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & _PRIMARY_CODE != sqlite3.SQLITE_BUSY:
                    break
            time.sleep(random.uniform(_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S))  # noqa: S311
        connection.exec_driver_sql(_BEGIN)
    finally:
        driver.execute(f"PRAGMA busy_timeout = {round(wait_s * 1000)}")


@contextlib.contextmanager
def pausing_afterwards() -> Iterator[None]:
    """Pause for as long as the block took, so that others who wait to write get a turn."""
    begun = time.monotonic()
    yield
    time.sleep(time.monotonic() - begun)
