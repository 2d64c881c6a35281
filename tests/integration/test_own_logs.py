"""Databases that share a storage have their logs apart, whatever their URLs are: two containers have the same one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qbatch.core.settings import Settings
from qbatch.models_db import jobs
from qbatch.models_db.batches import add_text
from qbatch.models_db.database_id import database_id
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.worker.housekeeping.prune import prune
from qbatch.worker.serving.supervisor import Supervisor
from tests.rows import PROTOCOL, a_batch
from tests.worker_context import a_worker_context, settings_in


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
def other_database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path / 'other.db'}")
    upgrade(database)
    return database


def log_of_the_first_bundle(database: Database, settings: Settings) -> Path:
    context = a_worker_context(database, settings)
    _, ids = a_batch(database)
    with database.write() as session:
        add_text(session, PROTOCOL.eval_text_sha256, "It was a quiet evening.")
        claims = jobs.claim(session, ids, context.worker_id, 60.0)
    return Supervisor(context, claims)._order().log_path


def test_jobs_of_one_id_do_not_write_into_one_log(
    sqlite_database: Database, other_database: Database, settings: Settings
) -> None:
    one, other = (log_of_the_first_bundle(database, settings) for database in (sqlite_database, other_database))
    assert one.name == other.name == "j1-1.runner.log"
    assert one != other


def test_old_logs_of_another_database_stay(
    sqlite_database: Database, other_database: Database, settings: Settings
) -> None:
    with other_database.read() as session:
        log = settings.logs_of(database_id(session)) / "j1-1.log"
    log.parent.mkdir(parents=True)
    log.write_text("said")
    long_ago = time.time() - 3600.0
    os.utime(log, (long_ago, long_ago))
    prune(sqlite_database, settings, 60.0)
    assert log.exists()
    prune(other_database, settings, 60.0)
    assert not log.exists(), "no job of its own has it"
