"""Upgrade a database to this version's schema. Alembic is slow to import, so only an upgrade does."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from qbatch.core.errors import DatabaseUnreachable, StorageUnavailable
from qbatch.core.filesystem import why_unusable
from qbatch.models_db.query_statistics import refresh_statistics
from qbatch.models_db.schema_state import SchemaState
from qbatch.models_db.session import SCHEMA_HEAD, Database

if TYPE_CHECKING:
    from alembic.config import Config

# An arbitrary constant: the PostgreSQL lock that prevents two upgrades of a database at once.
_UPGRADE_LOCK = 7_226_284
# PostgreSQL's error code, and how often an upgrade is begun again after it.
_DEADLOCK = "40P01"
_MOST_TRIES = 5


def upgrade(database: Database) -> None:
    """Run the missing migrations in one transaction. Running it twice, or from two processes at once, is safe.

    Does nothing if migrations of a newer version have run. Raises ForeignSchema if this version cannot work with those,
    DatabaseUnreachable, or StorageUnavailable if the folder of an SQLite file cannot be created.
    """
    if database.file is not None:
        _make_folder(database, database.file.parent)
    for tries_left in reversed(range(_MOST_TRIES)):
        try:
            _migrate(database)
            return
        except DatabaseUnreachable as error:
            # A worker and the migrations, which take locks of several tables, wait for each other: one is undone.
            if tries_left == 0 or not _is_deadlock(error):
                raise


def _migrate(database: Database) -> None:
    with database.write() as session:
        if not database.is_sqlite:
            session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
        state = SchemaState.read(session.connection())
        database.require_tolerable(state)
        if state.is_newer_than(SCHEMA_HEAD):
            return
        from alembic import command

        config = alembic_config()
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "head")
    refresh_statistics(database)


def _is_deadlock(error: DatabaseUnreachable) -> bool:
    cause = error.__cause__
    return isinstance(cause, DBAPIError) and getattr(cause.orig, "sqlstate", None) == _DEADLOCK


def _make_folder(database: Database, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_create(database, why_unusable(error)) from error
    # SQLite would say no more than that it cannot open the file.
    if not os.access(folder, os.W_OK | os.X_OK) and not os.path.lexists(database.file or folder):
        raise _cannot_create(database, f"{folder}: {os.strerror(errno.EACCES)}")


def _cannot_create(database: Database, why: str) -> StorageUnavailable:
    return StorageUnavailable(f"the database {database.place} cannot be created: {why}")


def alembic_config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def ensure(database: Database) -> None:
    """Upgrade the database if it is SQLite; a PostgreSQL database must be upgraded with ``qbatch db upgrade``."""
    if database.is_sqlite and database.is_behind():
        upgrade(database)
    database.require_schema()
