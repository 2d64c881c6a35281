"""The database goes away under running jobs, and hosts disagree about the time: no result is lost, no lease ended.

The fleet of this file is one of three hosts: the scheduler's clock is an hour ahead, one worker's an hour behind.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest

from qbatch.core.errors import BrokerUnreachable
from qbatch.core.settings import Settings
from qbatch.models_db.session import Database
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.loop import Scheduler
from tests.faults.conftest import MakeModel, fleet_of
from tests.faults.fleet import LEASE_S, Fleet
from tests.faults.fleet_services import PASSWORD, Redis
from tests.postgres import Postgres
from tests.rows import a_batch, a_worker, claim, states

_HOUR_S = 3600.0
_SHIFT = """
import time
shift_s, now, now_ns = {shift_s}, time.time, time.time_ns
time.time = lambda: now() + shift_s
time.time_ns = lambda: now_ns() + int(shift_s * 10**9)
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, redis_server: Redis) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("hosts")
    url = f"redis://:{PASSWORD}@127.0.0.1:{redis_server.port}/2"
    with fleet_of(folder, url, postgres.url) as fleet:
        for name, args, shift_s in (
            ("scheduler", ["scheduler"], _HOUR_S),
            ("w1", ["worker", "--cpu"], -_HOUR_S),
            ("w2", ["worker", "--cpu"], 0.0),
        ):
            site = folder / f"site-{name}"
            site.mkdir()
            (site / "sitecustomize.py").write_text(_SHIFT.format(shift_s=shift_s))
            path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
            fleet.start(name, *args, PYTHONPATH=path)
        fleet.wait_for_workers(2)
        yield fleet


def test_no_lease_is_ended_by_clocks_an_hour_apart(hosts: Fleet, make_model: MakeModel) -> None:
    assert [round(_ahead_s(hosts, name) / _HOUR_S) for name in ("scheduler", "w1", "w2")] == [1, -1, 0]
    bundles = [hosts.submit(make_model(large=True), bits=(8,), baseline=True) for _ in range(2)]
    jobs = [job for bundle in bundles for job in bundle]
    runners = []
    for bundle in bundles:
        runners.append(hosts.wait_for_runner(bundle[0]).runner)
        runners[-1].suspend()  # it must not end before the other host has begun
    time.sleep(1.5 * LEASE_S)  # however fast the machine is, they work for longer than a lease
    for runner in runners:
        runner.resume()
    hosts.succeed(jobs)
    assert [hosts.outcomes(job) for job in jobs] == [["succeeded"]] * 4
    assert len({job.worker_id for job in hosts.jobs(jobs)}) == 2, "both hosts worked"


def _ahead_s(fleet: Fleet, name: str) -> float:
    """How far a process's clock is ahead of ours, give or take how long ago it wrote its first line."""
    line = next(line for line in fleet.log(name).read_text().splitlines() if " INFO " in line)
    return datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S").timestamp() - time.time()  # noqa: DTZ007


def test_a_database_down_for_longer_than_a_lease_costs_nobody_anything(
    hosts: Fleet, postgres: Postgres, make_model: MakeModel
) -> None:
    # One is done during the outage, the other goes on throughout.
    short = hosts.submit(make_model(large=True))
    long = hosts.submit(make_model(large=True), bits=(4, 8), baseline=True)
    hosts.wait_for(lambda: hosts.job(short[0]).stage == "benchmarking", "benchmark")
    hosts.wait_for(lambda: any(job.state == "running" for job in hosts.jobs(long)), "second running bundle")
    published = _inode(hosts, short[0])
    postgres.stop()
    stopped_at = time.monotonic()
    hosts.wait_for(lambda: bool(hosts.spooled()), "spooled result")
    time.sleep(max(stopped_at + 1.5 * LEASE_S - time.monotonic(), 0.0))
    postgres.start()
    hosts.succeed(short + long)
    assert [hosts.outcomes(job) for job in short + long] == [["succeeded"]] * 4
    assert [job.failures for job in hosts.jobs(short + long)] == [0] * 4
    assert _inode(hosts, short[0]) == published, "nothing was quantized again"
    assert hosts.spooled() == []


def test_an_outage_longer_than_a_lease_and_under_two_scans_is_noticed(
    sqlite_database: Database, tmp_path: Path
) -> None:
    settings = Settings(
        home=tmp_path, storage=tmp_path, cache=tmp_path, broker_url="redis://127.0.0.1:1/0",
        lease_s=2.4, heartbeat_s=0.1, scan_s=2.3, backoff_s=0.01,
    )  # fmt: skip
    scheduler = Scheduler(sqlite_database, Broker(settings), settings)
    began = time.monotonic()
    while time.monotonic() < began + 1.2 * settings.lease_s:  # until it leads and its first quiet lease is over
        _tick(scheduler)
    _, ids = a_batch(sqlite_database)
    claim(sqlite_database, ids, a_worker(sqlite_database), lease_s=settings.lease_s)
    time.sleep(1.2 * settings.lease_s)  # nobody can reach the database: the lease runs out
    back_at = time.monotonic()
    while states(sqlite_database)[ids[0]] == "running":
        _tick(scheduler)
        assert time.monotonic() < back_at + 30.0
    assert time.monotonic() - back_at >= settings.lease_s


def _tick(scheduler: Scheduler) -> None:
    with contextlib.suppress(BrokerUnreachable):
        scheduler.tick()
    time.sleep(0.05)


def _inode(fleet: Fleet, job: int) -> tuple[Path, int]:
    folder = fleet.checkpoint_of(job)
    assert folder is not None
    return folder, folder.stat().st_ino


def test_a_database_locked_for_longer_than_a_lease_costs_nobody_anything(fleet: Fleet, make_model: MakeModel) -> None:
    fleet.wait_for_workers(2)
    short, long = fleet.submit(make_model(large=True), make_model(large=True))
    fleet.wait_for_state([short, long], "running")
    fleet.wait_for(lambda: fleet.job(short).stage == "benchmarking", "benchmark")
    published = _inode(fleet, short)
    with closing(sqlite3.connect(fleet.qbatch.home / "qbatch.db", isolation_level=None)) as other:
        other.execute("PRAGMA busy_timeout = 20000")
        other.execute("BEGIN IMMEDIATE")
        locked_at = time.monotonic()
        fleet.wait_for(lambda: bool(fleet.spooled()), "spooled result")
        time.sleep(max(locked_at + 1.5 * LEASE_S - time.monotonic(), 0.0))
        other.execute("ROLLBACK")
    fleet.succeed([short, long])
    assert [fleet.outcomes(job) for job in (short, long)] == [["succeeded"]] * 2
    assert [job.failures for job in fleet.jobs([short, long])] == [0, 0]
    assert _inode(fleet, short) == published, "nothing was quantized again"
    assert fleet.spooled() == []
