"""SQLite has one lock for writing: whoever waits gets it soon after it is free, and says so when it never is."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from qbatch.core.errors import DatabaseUnreachable
from qbatch.core.settings import Settings
from qbatch.models_db import workers
from qbatch.models_db.session import Database
from qbatch.worker.serving.celery_worker import CeleryWorker
from tests.rows import a_worker
from tests.waiting import until


@pytest.fixture
def other(sqlite_database: Database) -> Iterator[Database]:
    database = Database(f"sqlite:///{sqlite_database.file}?timeout=0.3")
    yield database
    database.dispose()


def test_a_lock_that_is_let_go_is_taken_at_once(sqlite_database: Database) -> None:
    worker_id = a_worker(sqlite_database)
    waited_s: list[float] = []
    free_at = 0.0

    def write() -> None:
        with sqlite_database.write() as session:
            workers.beat(session, worker_id)
            waited_s.append(time.monotonic() - free_at)

    with sqlite_database.write() as session:
        workers.beat(session, worker_id)
        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.3)
        free_at = time.monotonic()
    thread.join()
    assert 0 < waited_s[0] < 10.0, "it does not wait for its turn until it gives up"


def test_a_lock_that_is_never_let_go_is_an_error_in_time(sqlite_database: Database, other: Database) -> None:
    worker_id = a_worker(sqlite_database)
    with sqlite_database.write() as session:
        workers.beat(session, worker_id)
        began = time.monotonic()
        with pytest.raises(DatabaseUnreachable, match="does not answer: database is locked"), other.write() as waiting:
            workers.beat(waiting, worker_id)
        assert 0.3 <= time.monotonic() - began < 5.0
    with other.write() as session:
        workers.beat(session, worker_id)


def test_a_worker_writes_its_heartbeat_no_more_often_than_asked(tmp_path: Path, sqlite_database: Database) -> None:
    """And looks more often, so that it soon notices what others have changed."""
    settings = Settings(
        home=tmp_path, storage=tmp_path, cache=tmp_path, database_url=f"sqlite:///{sqlite_database.file}",
        heartbeat_s=0.6, lease_s=2.0,
    )  # fmt: skip
    worker = CeleryWorker(settings, None, multiprocessing.get_context("forkserver"), drain=False)
    worker_id = a_worker(sqlite_database)
    seen: list[str] = []

    @event.listens_for(worker._database.engine, "before_cursor_execute")
    def _note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    beats = threading.Thread(target=worker._beat, args=(worker_id, lambda: None))
    began = time.monotonic()
    beats.start()
    until(lambda: sum("UPDATE workers" in statement for statement in seen) == 3, "three heartbeats")
    took_s = time.monotonic() - began
    worker._ended.set()
    beats.join()
    assert took_s >= 2 * 0.5
    assert sum(statement.startswith("SELECT workers.state") for statement in seen) > 3
    worker._database.dispose()
