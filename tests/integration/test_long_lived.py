"""Processes that run for months hold no more after many jobs than after a few."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from qbatch.core.settings import Settings
from qbatch.models_db import workers
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.flower import set_options
from qbatch.scheduler.loop import Scheduler
from qbatch.scheduler.private_redis import PrivateRedis
from tests.rows import a_batch, a_worker, bundle, claim, succeed

_WARM_UP, _TICKS = 40, 40


@pytest.fixture
def settings(sqlite_database: Database, tmp_path: Path) -> Settings:
    """Each tick is a scan for lost messages too."""
    url = sqlite_database.engine.url.render_as_string(hide_password=False)
    environ = {"QBATCH_HOME": str(tmp_path / "home"), "QBATCH_DATABASE_URL": url, "QBATCH_SCAN_S": "0.001"}
    settings = Settings.from_env(environ)
    for folder in (settings.home / "logs", settings.storage):
        folder.mkdir(parents=True)
    return settings


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    server = PrivateRedis(settings, environ=os.environ)
    server.start()
    broker = Broker(settings)
    yield broker
    broker.close()
    server.stop()


def test_a_scheduler_keeps_nothing_of_what_it_sent(
    sqlite_database: Database, settings: Settings, broker: Broker
) -> None:
    worker = a_worker(sqlite_database)
    scheduler = Scheduler(sqlite_database, broker, settings)

    def work(ticks: int) -> int:
        for number in range(ticks):
            a_batch(sqlite_database, bundle(f"/models/{number}"))
            with sqlite_database.write() as session:
                workers.beat(session, worker)
            scheduler.tick()
            with sqlite_database.read() as session:
                sent = list(session.scalars(select(Job.id).where(Job.dispatch_id > "", Job.state == "queued")))
            for token in claim(sqlite_database, sent, worker):
                assert succeed(sqlite_database, token)
        gc.collect()
        return len(gc.get_objects())

    before = work(_WARM_UP)
    assert work(_TICKS) - before < _TICKS, "less than one object a tick"


@pytest.fixture
def flower_options() -> Iterator[Any]:
    """Flower's, which are those of the whole process."""
    from flower.options import options

    before = options.as_dict()
    yield options
    for name, value in before.items():
        setattr(options, name, value)


def test_flower_keeps_as_many_tasks_as_fit_into_memory(flower_options: Any) -> None:
    set_options("someone:a-password")
    assert flower_options.max_tasks == 10_000
