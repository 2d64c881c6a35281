"""A PostgreSQL that refuses writes or lacks its tables counts as unreachable: no job fails because of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, text

from qbatch.core.errors import DatabaseUnreachable
from qbatch.models_db.session import Database
from tests.rows import a_batch, a_worker, claim


@contextmanager
def read_only(database: Database) -> Iterator[Callable[[], None]]:
    """For new connections, until the context ends or what it yields is called."""
    engine = create_engine(database.engine.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        name = database.engine.dialect.identifier_preparer.quote(connection.scalar(text("SELECT current_database()")))

        def writes() -> None:
            connection.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))

        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        try:
            yield writes
        finally:
            writes()
    engine.dispose()


def test_a_postgresql_that_only_reads_counts_as_away_until_it_writes_again(postgresql_database: Database) -> None:
    worker = a_worker(postgresql_database)
    _, ids = a_batch(postgresql_database)
    postgresql_database.dispose()
    with read_only(postgresql_database) as writes:
        with pytest.raises(DatabaseUnreachable, match="read-only transaction"):
            claim(postgresql_database, ids, worker)
        writes()
        assert len(claim(postgresql_database, ids, worker)) == len(ids), "over a new connection"


def test_a_postgresql_whose_tables_are_away_counts_as_away(postgresql_database: Database) -> None:
    """As while a backup is restored: a spooled outcome must not be thrown away for it."""
    worker = a_worker(postgresql_database)
    _, ids = a_batch(postgresql_database)
    with postgresql_database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs RENAME TO jobs_of_yesterday"))
    with pytest.raises(DatabaseUnreachable, match="jobs"):
        claim(postgresql_database, ids, worker)
    with postgresql_database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs_of_yesterday RENAME TO jobs"))
    assert len(claim(postgresql_database, ids, worker)) == len(ids)
