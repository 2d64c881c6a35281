"""Engines and transactions on SQLite and PostgreSQL, and the translation of their errors."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import Session

from qbatch.core.errors import (
    DatabaseRefused,
    DatabaseReplaced,
    DatabaseUnreachable,
    ForeignSchema,
    UsageError,
    WrongDatabase,
)
from qbatch.models_db.arrival_filter import hide_arriving
from qbatch.models_db.connections import ADVICE, are_all_taken, connect_patiently
from qbatch.models_db.database_file import DatabaseFile
from qbatch.models_db.database_id import find_database_id
from qbatch.models_db.schema_state import SchemaState, read_version
from qbatch.models_db.write_lock import begin_writing

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

# The newest migration. A test compares it with Alembic's; importing Alembic would cost every command 0.3 s.
SCHEMA_HEAD = "0019"
# PostgreSQL's error codes for a read-only server, such as a demoted primary, for missing rights, and for a missing
# schema or table, as during the restoration of a backup.
_NOT_NOW = {"25006", "3F000", "42501", "42P01"}
# SQLite's code for an invalid statement, which it raises with the same class as errors of a disk or a lock.
_SQL_LOGIC_ERROR = 1

NO_SYNC = {"synchronize_session": False}
"""For statements that change rows which the session has not loaded, or that nobody reads from it any more."""
VALUES_AT_ONCE = 500
"""How many values one statement may have: SQLite takes more parameters, but PostgreSQL plans so many well."""

_T = TypeVar("_T")


def in_chunks(values: Sequence[_T], most: int = VALUES_AT_ONCE) -> Iterator[Sequence[_T]]:
    """``values`` in pieces of at most ``most``."""
    return (values[start : start + most] for start in range(0, len(values), most))


class Database:
    """A database. Creating the object is cheap; it connects on first use.

    PostgreSQL ends a write transaction that is idle for ``frozen_s``, for example because its process is frozen. With
    None, only the keepalive of the network ends it, hours later.
    """

    def __init__(self, url: str, *, frozen_s: float | None = None) -> None:
        """Raises UsageError if the URL is not supported."""
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError) as error:  # ValueError: the port is not a number
            raise UsageError("QBATCH_DATABASE_URL is not a database URL") from error
        backend = parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise UsageError(f"QBATCH_DATABASE_URL must be for SQLite or PostgreSQL, not {backend}")
        if backend == "postgresql" and parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.is_sqlite = backend == "sqlite"
        if self.is_sqlite:
            _refuse_other_files(parsed)
        self.place = _without_password(parsed)
        self.file = Path(parsed.database) if self.is_sqlite and parsed.database else None
        self._file = DatabaseFile(self.file) if self.file is not None else None
        self._identity: str | None = None
        try:
            self._engine = (
                _sqlite_engine(parsed, self._file) if self.is_sqlite else _postgresql_engine(parsed, frozen_s)
            )
        except (ArgumentError, ImportError) as error:
            raise UsageError(f"QBATCH_DATABASE_URL needs {parsed.drivername}, which is not installed") from error
        # SQLite shows each transaction one state of the database by itself.
        one_state = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._reader = self._engine.execution_options(qbatch_read=True, **one_state)
        self._session = _SqliteSession if self.is_sqlite else Session

    @property
    def engine(self) -> Engine:
        return self._engine

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end. Raises DatabaseUnreachable."""
        with _reachable(self.place), self._session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A read-only transaction, which sees one state of the database. Raises DatabaseUnreachable."""
        with _reachable(self.place), self._session(self._reader) as session, session.begin():
            yield session

    def schema(self) -> SchemaState:
        """The state of the schema. Creates nothing. Raises DatabaseUnreachable."""
        if self._file is not None:
            self._file.check()
            if not self._has_file(self._file.path):
                return SchemaState(version=None, oldest_code={})
        with _reachable(self.place), self._reader.connect() as connection:
            return SchemaState.read(connection)

    def schema_version(self) -> str | None:
        """The newest migration that has run; None for an empty database. Creates nothing."""
        return self.schema().version

    def is_behind(self) -> bool:
        """Whether migrations of this version have not run yet.

        Raises ForeignSchema if migrations of a newer version have run with which this version cannot work.
        """
        state = self.schema()
        self.require_tolerable(state)
        return not state.is_newer_than(SCHEMA_HEAD) and state.version != SCHEMA_HEAD

    def _has_file(self, file: Path) -> bool:
        try:
            return file.exists()
        except OSError as error:
            raise DatabaseUnreachable(f"the database {self.place} cannot be accessed: {error.strerror}") from error

    def require_schema(self) -> None:
        """Raise DatabaseUnreachable, saying what to run, unless this version can work with the schema.

        Raises ForeignSchema if a newer version has changed the schema; waiting does not help then.
        """
        if self.is_behind():
            raise self._behind(self.schema_version())
        with self.read() as session:
            self.require_own(session)

    def require_own(self, session: Session) -> None:
        """Check the schema as ``require_schema`` does, within a transaction and at little cost.

        Also raises DatabaseReplaced if this is not the database that was there at the first check.
        """
        connection = session.connection()
        version = read_version(connection)
        state = SchemaState.read(connection) if version != SCHEMA_HEAD else None
        if state is not None and not state.is_newer_than(SCHEMA_HEAD):
            raise self._behind(version)
        self._recognise(find_database_id(connection))
        if state is not None:
            self.require_tolerable(state)

    def require_same(self, session: Session) -> None:
        """Check the database as ``require_own`` does, but accept the schema of any newer version.

        For renewing leases and returning running jobs: a changed schema may still permit that, but it must never
        happen on another database.
        """
        with suppress(ForeignSchema):
            self.require_own(session)

    @property
    def identity(self) -> str | None:
        """The UUID that tells this database from another at the same URL; None until the first ``require_own``."""
        return self._identity

    def _behind(self, version: str | None) -> DatabaseUnreachable:
        return DatabaseUnreachable(
            f"the database {self.place} has schema {version or 'none'}, and this qbatch needs {SCHEMA_HEAD}:"
            " run `qbatch db upgrade`"
        )

    def require_tolerable(self, state: SchemaState) -> None:
        """Raise ForeignSchema for the schema of a newer version with which this version cannot work."""
        if state.is_newer_than(SCHEMA_HEAD) and not state.works_with(SCHEMA_HEAD):
            raise ForeignSchema(
                f"the database {self.place} has schema {state.version} of a newer qbatch; this one knows"
                f" {SCHEMA_HEAD} and cannot work with it: update qbatch here"
            )

    def _recognise(self, identity: str | None) -> None:
        if self._identity is None:
            self._identity = identity
        elif identity != self._identity:
            raise DatabaseReplaced(
                f"the database {self.place} was replaced by another one, so qbatch stops using it: restart the"
                " processes that should use the new one"
            )

    def dispose(self) -> None:
        self._engine.dispose()


class SharedJson(dict[str, Any]):
    """A JSON object that many rows have, so that it is encoded once. Do not change it."""

    @cached_property
    def encoded(self) -> str:
        return _to_json(dict(self))


class _SqliteSession(Session):
    """A session in which no statement sees a batch that is still being stored. Use it for one transaction."""


event.listen(_SqliteSession, "do_orm_execute", hide_arriving)


def insert_into(session: Session, table: type[Any]) -> postgresql.Insert | sqlite.Insert:
    """An INSERT with support for ON CONFLICT, which SQLAlchemy offers only per dialect."""
    # Imported here, because each takes as long as many a command otherwise.
    if session.get_bind().dialect.name == "sqlite":
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql

    return postgresql.insert(table)


def _without_password(url: URL) -> str:
    """The URL for messages, without a password, also not one among the options of the driver."""
    options = {key: value for key, value in url.query.items() if "pass" not in key.lower()}
    return url.set(query=options).render_as_string(hide_password=True)


def _to_json(value: Any) -> str:
    """Encode JSON with null for NaN and infinity, which PostgreSQL's JSON does not support."""
    if isinstance(value, SharedJson):
        return value.encoded
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_other_files(url: URL) -> None:
    """Raise UsageError unless a SQLite URL names a plain file.

    A database in memory would be lost with each process. Options of SQLite (``mode=ro``, ``immutable=1``) are either
    ignored or make the database unusable for qbatch.
    """
    name = url.database or ""
    if url.host or not name or name.startswith((":memory:", "file:")) or "\0" in name:
        raise UsageError("QBATCH_DATABASE_URL does not name a file: write sqlite:////absolute/path/qbatch.db")
    if unknown := url.query.keys() - {"timeout"}:
        raise UsageError(
            f"QBATCH_DATABASE_URL has the option {min(unknown)!r}; the only one supported for SQLite is timeout"
        )
    try:
        float(str(url.query.get("timeout", 0)))
    except ValueError as error:
        raise UsageError("QBATCH_DATABASE_URL: the option timeout must be a number of seconds") from error


def _sqlite_engine(url: Any, file: DatabaseFile | None) -> Engine:
    # How long to wait for another writer.
    wait_s = float(url.query.get("timeout", 30.0))
    engine = create_engine(url, json_serializer=_to_json, connect_args={"timeout": wait_s, "check_same_thread": False})

    @event.listens_for(engine, "do_connect")
    def _before_connect(*_: Any) -> None:
        if file is not None:
            file.check()

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        if file is not None:
            file.note()
        # The driver must not begin transactions by itself, because _on_begin chooses their kind.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        if file is not None:
            file.check()
        # A deferred transaction that first reads and then writes could lose updates of other processes.
        reads = connection.get_execution_options().get("qbatch_read", False)
        if reads:
            connection.exec_driver_sql("BEGIN")
        else:
            begin_writing(connection, wait_s)

    return engine


def _postgresql_engine(url: Any, frozen_s: float | None) -> Engine:
    # If the network drops packets silently, a supervisor must not hang past its lease: give up after 15 s.
    alive = {"tcp_user_timeout": 15_000, "keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 2}
    # One connection is kept. Threads that need others at the same moment open them and close them again: a server takes
    # only so many, and each worker and scheduler is a process of its own.
    engine = create_engine(
        url,
        json_serializer=_to_json,
        pool_pre_ping=True,
        pool_size=1,
        connect_args={"connect_timeout": 5, **alive},
    )

    @event.listens_for(engine, "do_connect")
    def _connect(dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        return connect_patiently(lambda: dialect.connect(*arguments, **options), dialect.loaded_dbapi.OperationalError)

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        if frozen_s is not None and not connection.get_execution_options().get("qbatch_read", False):
            connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {round(frozen_s * 1000)}")

    @event.listens_for(engine, "after_cursor_execute")
    def _after_many(connection: Connection, _cursor: Any, _sql: str, _of: Any, _context: Any, is_many: bool) -> None:
        # The driver sends many rows in a pipeline. After one, PostgreSQL 18 was seen to wait for ever all the same.
        if frozen_s is not None and is_many:
            with closing(connection.connection.cursor()) as cursor:
                cursor.execute("SELECT 1")

    @event.listens_for(engine, "handle_error")
    def _on_error(context: ExceptionContext) -> None:
        # Treat the server as unreachable until a new connection works.
        if getattr(context.original_exception, "sqlstate", None) in _NOT_NOW:
            context.is_disconnect = True

    return engine


@contextmanager
def _reachable(place: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
            raise WrongDatabase(
                f"the database {place} cannot be read: file is not a database (correct QBATCH_DATABASE_URL, or move the"
                " file away)"
            ) from error
        if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY:
            raise DatabaseUnreachable(
                f"the database {place} may not be written by this user, which SQLite needs to read it too: its owner "
                "can give that right, for the file and its folder"
            ) from error
        if type(error.orig) is sqlite3.DatabaseError:  # the file is damaged
            raise DatabaseUnreachable(f"the database {place} cannot be read: {_first_line(error)}") from error
        if isinstance(error, OperationalError) and are_all_taken(error.orig):
            raise DatabaseUnreachable(f"the database {place} takes no more connections: {ADVICE}") from error
        if _is_away(error):
            raise DatabaseUnreachable(f"the database {place} does not answer: {_first_line(error)}") from error
        raise DatabaseRefused(f"the database {place} refused a statement: {_first_line(error)}") from error


def _is_away(error: DBAPIError) -> bool:
    if isinstance(error.orig, sqlite3.OperationalError) and error.orig.sqlite_errorcode == _SQL_LOGIC_ERROR:
        # A missing table may mean that a backup is being restored; a missing column does not.
        return "no such table" in str(error.orig)
    return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
