"""Fleets to hurt, and models for them to work on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from tests import tiny
from tests.acceptance.conftest import Qbatch
from tests.faults.fleet import PACE, Fleet
from tests.faults.fleet_services import PASSWORD, Redis, Wire

MakeModel = Callable[..., Path]
_LARGE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A causal model that no other test has: 0.8 MB, or a ``large`` one of 37 MB whose stages take their time."""
    folder = tmp_path_factory.mktemp("sources")
    numbers = itertools.count(1)

    def make(*, large: bool = False) -> Path:
        number = next(numbers)
        size: dict[str, Any] = _LARGE if large else {}
        return tiny.make_causal(folder / f"m{number}", dtype="bfloat16", seed=number, **size)

    return make


@contextmanager
def fleet_of(folder: Path, broker_url: str, database_url: str | None = None, **env: str) -> Iterator[Fleet]:
    """A fleet with nothing running yet. What it runs when the context ends is stopped, and must leave nothing."""
    qbatch = Qbatch(folder / "home", PACE | {"QBATCH_BROKER_URL": broker_url} | env)
    if database_url is not None:
        qbatch.env["QBATCH_DATABASE_URL"] = database_url
    qbatch.home.mkdir(parents=True)
    database = Database(database_url or f"sqlite:///{qbatch.home / 'qbatch.db'}")
    upgrade(database)
    fleet = Fleet(qbatch, database)
    try:
        yield fleet
    finally:
        fleet.close()


@pytest.fixture(scope="package")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="package")
def wire(redis_server: Redis) -> Iterator[Wire]:
    """The fleet's way to Redis."""
    with Wire(redis_server.port) as wire:
        yield wire


@pytest.fixture(scope="package")
def package_fleet(tmp_path_factory: pytest.TempPathFactory, wire: Wire) -> Iterator[Fleet]:
    url = f"redis://:{PASSWORD}@127.0.0.1:{wire.port}/0"
    folder = tmp_path_factory.mktemp("fleet")
    # Who finds the database locked gives up after 5 s rather than 30: some test locks it.
    with fleet_of(folder, url, f"sqlite:///{folder / 'home' / 'qbatch.db'}?timeout=5") as fleet:
        fleet.start("scheduler", "scheduler")
        fleet.start("w1", "worker", "--cpu")
        fleet.start("w2", "worker", "--cpu")
        fleet.wait_for_workers(2)
        yield fleet


@pytest.fixture
def fleet(package_fleet: Fleet) -> Fleet:
    """A scheduler and two workers on SQLite, shared by tests that leave it as they found it."""
    assert package_fleet.running.keys() == {"scheduler", "w1", "w2"}
    package_fleet.wait_for_live(2)
    return package_fleet
