"""A PostgreSQL server that takes few connections: a worker keeps one, and who is refused comes again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from qbatch.core.errors import DatabaseUnreachable
from qbatch.core.settings import Settings
from qbatch.models_db import connections, workers
from qbatch.models_db.connections import count_connections
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.scheduler.__main__ import wait_for_schema
from qbatch.scheduler.stop import Stop
from qbatch.views.checks import Check, State
from qbatch.views.doctor import examine
from tests.postgres import Postgres
from tests.rows import a_worker
from tests.waiting import until

MOST = 8
WORKERS = 6


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    server = Postgres()
    with psycopg.connect(plain(server.url), autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET max_connections = {MOST}")
        connection.execute("ALTER SYSTEM SET superuser_reserved_connections = 0")
        # Each would take one of those.
        connection.execute("ALTER SYSTEM SET max_wal_senders = 0")
        # Its workers would be counted among those.
        connection.execute("ALTER SYSTEM SET autovacuum = off")
    server.stop()
    server.start()
    database = Database(server.url)
    upgrade(database)
    database.dispose()
    yield server.url
    server.close()


def plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://", 1)


@pytest.fixture
def small(server_url: str) -> Iterator[Database]:
    database = Database(server_url)
    yield database
    database.dispose()


@pytest.fixture
def all_taken(server_url: str) -> Iterator[list[psycopg.Connection]]:
    """Every connection there is."""
    first = psycopg.connect(plain(server_url), autocommit=True)

    def is_alone() -> bool:
        """The server ends a connection some time after it was closed."""
        return first.execute("SELECT sum(numbackends) FROM pg_stat_database").fetchone() == (1,)

    until(is_alone, "end of earlier connections")
    held = [first, *(psycopg.connect(plain(server_url)) for _ in range(MOST - 1))]
    yield held
    for connection in held:
        connection.close()


def used(database: Database) -> int:
    with database.read() as session:
        return count_connections(session).used


def ask(database: Database) -> None:
    with database.read() as session:
        workers.live(session, 60.0)


def let_go(held: list[psycopg.Connection], after_s: float) -> threading.Timer:
    timer = threading.Timer(after_s, lambda: [connection.close() for connection in held])
    timer.start()
    return timer


def test_workers_of_two_threads_each_keep_one_connection(server_url: str, small: Database) -> None:
    fleet = [Database(server_url) for _ in range(WORKERS)]
    ids = [a_worker(small, f"w{n}") for n in range(WORKERS)]
    both = threading.Barrier(2)

    def at_once(database: Database, worker_id: int) -> None:
        with database.write() as session:
            workers.beat(session, worker_id)
        both.wait()
        with database.read() as session:
            workers.live(session, 60.0)
            both.wait()

    small.dispose()
    with ThreadPoolExecutor(2) as threads:
        for database, worker_id in zip(fleet, ids, strict=True):
            # Its heartbeat, and its task: for a moment it has two.
            for future in [threads.submit(at_once, database, worker_id), threads.submit(at_once, database, worker_id)]:
                future.result()
    try:
        until(lambda: used(small) == WORKERS + 1, "one connection each")
    finally:
        for database in fleet:
            database.dispose()


def test_connections_of_other_roles_are_counted_too(server_url: str) -> None:
    """An ordinary role is not told what they are."""
    with psycopg.connect(plain(server_url), autocommit=True) as others:
        others.execute("CREATE ROLE ordinary LOGIN")
        name = others.info.dbname
        ordinary = Database(f"postgresql+psycopg://ordinary@/{name}?host={others.info.host}&port={others.info.port}")
        try:
            until(lambda: used(ordinary) == 2, "two connections")
        finally:
            ordinary.dispose()
            others.execute("DROP ROLE ordinary")


def test_who_is_refused_comes_again(small: Database, all_taken: list[psycopg.Connection]) -> None:
    began = time.monotonic()
    timer = let_go(all_taken, 0.5)
    ask(small)
    assert time.monotonic() - began >= 0.5
    timer.join()


def test_a_server_without_connections_is_named_with_the_remedy(
    small: Database, all_taken: list[psycopg.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_PAUSES_S", (0.01, 0.02))
    with pytest.raises(DatabaseUnreachable, match="takes no more connections: raise max_connections"):
        ask(small)


def test_a_service_outlasts_a_server_without_connections(
    small: Database, all_taken: list[psycopg.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_PAUSES_S", (0.01,))
    stop = Stop()
    service = threading.Thread(target=wait_for_schema, args=(small, stop))
    service.start()
    timer = let_go(all_taken, 0.2)
    service.join(timeout=20)
    assert not service.is_alive()
    timer.join()


def test_doctor_counts_the_connections(server_url: str, tmp_path: Path) -> None:
    settings = Settings.from_env({"QBATCH_HOME": str(tmp_path), "QBATCH_DATABASE_URL": server_url})

    def line() -> Check:
        return {one.check: one for one in examine(settings, gpus=(), stack_runs=False)}["connections"]

    until(lambda: line().message.startswith(f"1 of {MOST} are in use"), "one connection")
    assert line().state is State.NOTE
    assert "raise max_connections" in line().message
