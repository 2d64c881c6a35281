"""A worker's surroundings, without the worker."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from models_db.domain import DeviceKind
from models_db.session import Database
from models_db.settings import Settings
from scheduler.stop import Stop
from tests.rows import a_worker, measured
from worker.recorder import Recorder
from worker.supervise import Station


def settings_in(folder: Path) -> Settings:
    return Settings(home=folder / "h", storage=folder / "s", cache=folder / "c", broker_url="redis://x/0")


def a_station(database: Database, settings: Settings) -> Station:
    return Station(
        database=database,
        settings=settings,
        recorder=Recorder(database, settings),
        worker_id=a_worker(database),
        device_kind=DeviceKind.CPU,
        device_name=measured().device_name,
        staging=settings.staging / "own",
        forkserver=multiprocessing.get_context("forkserver"),
        stopping=Stop(),
    )
