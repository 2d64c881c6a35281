"""A WorkerContext for tests, without a running worker."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from qbatch.core.domain import DeviceKind
from qbatch.core.settings import Settings
from qbatch.models_db.session import Database
from qbatch.scheduler.stop import Stop
from qbatch.worker.serving.next_source import NextSource
from qbatch.worker.serving.recorder import Recorder
from qbatch.worker.serving.runners import Runners
from qbatch.worker.serving.supervisor import WorkerContext
from tests.rows import a_worker, measured


def settings_in(folder: Path) -> Settings:
    return Settings(home=folder / "h", storage=folder / "s", cache=folder / "c", broker_url="redis://x/0")


def a_worker_context(database: Database, settings: Settings) -> WorkerContext:
    worker_id = a_worker(database)
    runners = Runners(multiprocessing.get_context("forkserver"), DeviceKind.CPU)
    return WorkerContext(
        database=database,
        settings=settings,
        recorder=Recorder(database, settings),
        worker_id=worker_id,
        device_kind=DeviceKind.CPU,
        device_name=measured().device_name,
        staging=settings.staging / "own",
        runners=runners,
        next_source=NextSource(
            database=database, settings=settings, runners=runners, worker_id=worker_id, queues=("qbatch.cpu",)
        ),
        stopping=Stop(),
    )
