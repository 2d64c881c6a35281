"""Bring a database to this version's schema. Imported where it is needed: Alembic is slow to import."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import text

from qbatch.core.errors import StorageUnavailable
from qbatch.models_db.schema_state import SchemaState
from qbatch.models_db.session import SCHEMA_HEAD, Database

# Any constant will do; it keeps two upgrades of one PostgreSQL database apart.
_UPGRADE_LOCK = 7_226_284


def upgrade(database: Database) -> None:
    """Run the migrations that are missing, in one transaction. Safe to run twice, and from two places at once.

    Where a newer version's have run there is nothing to do. Raises ForeignSchema where this one's code cannot work with
    what they left, DatabaseUnreachable, and StorageUnavailable where SQLite's file has no folder to be in.
    """
    if database.file is not None:
        _make_folder(database, database.file.parent)
    with database.write() as session:
        if not database.is_sqlite:
            session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
        state = SchemaState.read(session.connection())
        database.require_tolerable(state)
        if state.is_newer_than(SCHEMA_HEAD):
            return
        config = alembic_config()
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "head")


def _make_folder(database: Database, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageUnavailable(
            f"the database {database.place} cannot be made: {error.filename}: {error.strerror}"
        ) from error


def alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def ensure(database: Database) -> None:
    """Make an embedded database ready: SQLite is brought up to date unasked, PostgreSQL only by its owner."""
    if database.is_sqlite and database.is_behind():
        upgrade(database)
    database.require_schema()
