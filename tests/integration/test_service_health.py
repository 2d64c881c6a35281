"""What a container's health check finds out of the database."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import update

from qbatch.core.domain import WorkerState
from qbatch.core.errors import DatabaseUnreachable, StackNotRunning
from qbatch.core.settings import Settings
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.leases import LEAD, acquire
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Worker
from qbatch.scheduler.service_health import check_scheduler, check_worker
from tests.rows import a_worker


@pytest.fixture
def settings(tmp_path: Path, sqlite_database: Database) -> Settings:
    return Settings(home=tmp_path, storage=tmp_path, cache=tmp_path, database_url=f"sqlite:///{sqlite_database.file}")


def test_a_scheduler_works_while_one_leads(sqlite_database: Database, settings: Settings) -> None:
    with pytest.raises(StackNotRunning, match="no scheduler leads"):
        check_scheduler(settings)
    with sqlite_database.write() as session:
        acquire(session, LEAD, "s1", settings.lead_s)
    assert check_scheduler(settings) == "s1 leads"


def test_workers_work_while_one_of_this_host_is_live(sqlite_database: Database, settings: Settings) -> None:
    a_worker(sqlite_database, "elsewhere")
    with pytest.raises(StackNotRunning, match="no worker of"):
        check_worker(settings)
    own = a_worker(sqlite_database, "own")

    def note(**values: object) -> None:
        with sqlite_database.write() as session:
            session.execute(update(Worker).where(Worker.id == own).values(**values))

    note(host=socket.gethostname())
    assert check_worker(settings) == "own live"
    for state in (WorkerState.QUARANTINED, WorkerState.STOPPED):
        note(state=state)
        with pytest.raises(StackNotRunning):
            check_worker(settings)
    note(state=WorkerState.READY, heartbeat_at=db_now(-settings.lease_s - 1))
    with pytest.raises(StackNotRunning):
        check_worker(settings)


@pytest.mark.parametrize("check", [check_scheduler, check_worker])
def test_a_database_without_a_schema_is_not_said_to_be_away(tmp_path: Path, check: Callable[[Settings], str]) -> None:
    settings = Settings.from_env({"QBATCH_HOME": str(tmp_path), "QBATCH_DATABASE_URL": f"sqlite:///{tmp_path / 'new'}"})
    with pytest.raises(DatabaseUnreachable, match=r"has schema none.*run `qbatch db upgrade`"):
        check(settings)
