"""Engines and transactions on SQLite and PostgreSQL, and the one seam that translates their failures."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import Session

from qbatch.core.errors import DatabaseRefused, DatabaseReplaced, DatabaseUnreachable, ForeignSchema, UsageError
from qbatch.models_db.database_file import DatabaseFile
from qbatch.models_db.database_id import find_database_id
from qbatch.models_db.schema_state import SchemaState, read_version

# The newest migration; a test holds it to what Alembic says. Asking Alembic would cost every command 0.3 s.
SCHEMA_HEAD = "0006"
# PostgreSQL's words for a write where none is allowed, as by a demoted primary, for rights that were taken away, and
# for a schema or a table that is not there, as while a backup is restored.
_NOT_NOW = {"25006", "3F000", "42501", "42P01"}
# SQLite's word for what it cannot make sense of, in the same class of errors as those of a disk or a lock.
_SQL_LOGIC_ERROR = 1

NO_SYNC = {"synchronize_session": False}
"""For statements that change rows which the session has not loaded, or that nobody reads from it any more."""
VALUES_AT_ONCE = 500
"""In one statement: fewer than SQLite takes parameters, and PostgreSQL plans well."""


class Database:
    """One database. Cheap to make; connects at first use.

    Who writes and is silent within a transaction for ``frozen_s`` is ended by PostgreSQL; None: only by its network's
    keepalive, hours later.
    """

    def __init__(self, url: str, *, frozen_s: float | None = None) -> None:
        """Raises UsageError where the URL is not one that qbatch speaks."""
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError) as error:  # ValueError: a port that is no number
            raise UsageError("QBATCH_DATABASE_URL is not a database URL") from error
        backend = parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise UsageError(f"qbatch keeps its jobs in SQLite or PostgreSQL, not in {backend}")
        if backend == "postgresql" and parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.is_sqlite = backend == "sqlite"
        if self.is_sqlite:
            _refuse_other_files(parsed)
        self.place = _shown(parsed)
        self.file = Path(parsed.database) if self.is_sqlite and parsed.database else None
        self._file = DatabaseFile(self.file) if self.file is not None else None
        self._identity: str | None = None
        try:
            self._engine = (
                _sqlite_engine(parsed, self._file) if self.is_sqlite else _postgresql_engine(parsed, frozen_s)
            )
        except (ArgumentError, ImportError) as error:
            raise UsageError(f"QBATCH_DATABASE_URL wants {parsed.drivername}, which is not installed") from error
        self._reader = self._engine.execution_options(qbatch_read=True)

    @property
    def engine(self) -> Engine:
        return self._engine

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end. Raises DatabaseUnreachable."""
        with _reachable(self.place), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only looks. Raises DatabaseUnreachable."""
        with _reachable(self.place), Session(self._reader) as session, session.begin():
            yield session

    def schema(self) -> SchemaState:
        """Where the database stands. Creates nothing. Raises DatabaseUnreachable."""
        if self._file is not None:
            self._file.check()
            if not self._has_file(self._file.path):
                return SchemaState(version=None, oldest_code={})
        with _reachable(self.place), self._reader.connect() as connection:
            return SchemaState.read(connection)

    def schema_version(self) -> str | None:
        """The migration that the database stands at; None for an empty database. Creates nothing."""
        return self.schema().version

    def is_behind(self) -> bool:
        """Whether migrations of this version are missing. Raises ForeignSchema where a newer version's have run that
        this one's code cannot work with."""
        state = self.schema()
        self.require_tolerable(state)
        return not state.is_newer_than(SCHEMA_HEAD) and state.version != SCHEMA_HEAD

    def _has_file(self, file: Path) -> bool:
        try:
            return file.exists()
        except OSError as error:
            raise DatabaseUnreachable(f"the database {self.place} cannot be looked at: {error.strerror}") from error

    def require_schema(self) -> None:
        """Raises DatabaseUnreachable, saying what to run, unless this version works with the schema: ForeignSchema
        where it is a newer one's, which is not waited for."""
        if self.is_behind():
            raise self._behind(self.schema_version())
        with self.read() as session:
            self.require_own(session)

    def require_own(self, session: Session) -> None:
        """The same within a transaction, at little cost. Raises DatabaseReplaced too, where this is not the database
        that it was when it was first asked."""
        connection = session.connection()
        version = read_version(connection)
        state = SchemaState.read(connection) if version != SCHEMA_HEAD else None
        if state is not None and not state.is_newer_than(SCHEMA_HEAD):
            raise self._behind(version)
        self._recognise(find_database_id(connection))
        if state is not None:
            self.require_tolerable(state)

    def require_same(self, session: Session) -> None:
        """The same, for what keeps alive or gives back what runs already: a newer version's schema may take that all
        the same; another database must not."""
        with suppress(ForeignSchema):
            self.require_own(session)

    @property
    def identity(self) -> str | None:
        """What tells this database from another in its place; None until it was asked whether it is our own."""
        return self._identity

    def _behind(self, version: str | None) -> DatabaseUnreachable:
        return DatabaseUnreachable(
            f"the database {self.place} is at schema {version or 'none'}, this qbatch needs {SCHEMA_HEAD}:"
            " run `qbatch db upgrade`"
        )

    def require_tolerable(self, state: SchemaState) -> None:
        """Raises ForeignSchema for a newer version's schema that this one's code does not work with."""
        if state.is_newer_than(SCHEMA_HEAD) and not state.works_with(SCHEMA_HEAD):
            raise ForeignSchema(
                f"the database {self.place} is at schema {state.version}, made by a newer qbatch; this one knows"
                f" {SCHEMA_HEAD} and cannot work with it: update qbatch here"
            )

    def _recognise(self, identity: str | None) -> None:
        if self._identity is None:
            self._identity = identity
        elif identity != self._identity:
            raise DatabaseReplaced(
                f"the database {self.place} is not the one it was: another one was put in its place; nothing more is"
                " done on it: start again what is to work on the new one"
            )

    def dispose(self) -> None:
        self._engine.dispose()


def insert_into(session: Session, table: type[Any]) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that can say what happens on conflict, which SQLAlchemy has only by dialect."""
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    return insert(table)


def _shown(url: URL) -> str:
    """The URL for people: no password, neither in its place nor among the driver's options."""
    options = {key: value for key, value in url.query.items() if "pass" not in key.lower()}
    return url.set(query=options).render_as_string(hide_password=True)


def _to_json(value: Any) -> str:
    """PostgreSQL's JSON knows no NaN and no infinity: what is no number is null, on both databases alike."""
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
    """Raises UsageError unless a SQLite URL names a plain file: what is kept in memory is forgotten with each process,
    and what SQLite is told of a file (``mode=ro``, ``immutable=1``) either passes unheard or cannot be worked with."""
    name = url.database or ""
    if url.host or not name or name.startswith((":memory:", "file:")) or "\0" in name:
        raise UsageError("QBATCH_DATABASE_URL names no file: write sqlite:////absolute/path/qbatch.db")
    if unknown := url.query.keys() - {"timeout"}:
        raise UsageError(f"QBATCH_DATABASE_URL: SQLite takes no option here but timeout, and not {min(unknown)!r}")
    try:
        float(str(url.query.get("timeout", 0)))
    except ValueError as error:
        raise UsageError("QBATCH_DATABASE_URL: SQLite's timeout is no number of seconds") from error


def _sqlite_engine(url: Any, file: DatabaseFile | None) -> Engine:
    # Arguments beat the URL, and how long to wait for another writer is the URL's to say: ``?timeout=5``.
    waits = {} if "timeout" in url.query else {"timeout": 30.0}
    engine = create_engine(url, json_serializer=_to_json, connect_args=waits | {"check_same_thread": False})

    @event.listens_for(engine, "do_connect")
    def _before_connect(*_: Any) -> None:
        if file is not None:
            file.check()

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        if file is not None:
            file.note()
        # The driver must not begin transactions by itself: _on_begin says which kind.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        if file is not None:
            file.check()
        # A deferred transaction that turns from reading to writing loses updates of other processes.
        reads = connection.get_execution_options().get("qbatch_read", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _postgresql_engine(url: Any, frozen_s: float | None) -> Engine:
    # A server that is cut off without a word must not hold a supervisor past its lease: 15 s, then it is unreachable.
    alive = {"tcp_user_timeout": 15_000, "keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 2}
    engine = create_engine(
        url, json_serializer=_to_json, pool_pre_ping=True, connect_args={"connect_timeout": 5, **alive}
    )

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        if frozen_s is not None and not connection.get_execution_options().get("qbatch_read", False):
            connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {round(frozen_s * 1000)}")

    @event.listens_for(engine, "handle_error")
    def _on_error(context: ExceptionContext) -> None:
        # As good as away, until a new connection finds it whole.
        if getattr(context.original_exception, "sqlstate", None) in _NOT_NOW:
            context.is_disconnect = True

    return engine


@contextmanager
def _reachable(place: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if type(error.orig) is sqlite3.DatabaseError:  # SQLite's for a file that is none of its own, or is damaged
            raise DatabaseUnreachable(f"the database {place} cannot be read: {_first_line(error)}") from error
        if _is_away(error):
            raise DatabaseUnreachable(f"the database {place} does not answer: {_first_line(error)}") from error
        raise DatabaseRefused(f"the database {place} refuses: {_first_line(error)}") from error


def _is_away(error: DBAPIError) -> bool:
    if isinstance(error.orig, sqlite3.OperationalError) and error.orig.sqlite_errorcode == _SQL_LOGIC_ERROR:
        # A table that is missing comes back with the backup that is being restored; a column does not.
        return "no such table" in str(error.orig)
    return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
