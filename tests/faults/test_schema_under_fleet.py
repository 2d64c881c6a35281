"""A newer version's migrations run under a fleet of this one: what they change loses no result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from qbatch.models_db.session import SCHEMA_HEAD
from qbatch.models_db.tables import Worker
from tests.faults.conftest import MakeModel, fleet_of
from tests.faults.fleet import LEASE_S, Fleet
from tests.faults.fleet_services import PASSWORD, Redis
from tests.migrating import AFTER_NEXT, INDEX, NOT_NULL, fill_the_new_column, migrate
from tests.postgres import Postgres


@pytest.fixture
def fleet(tmp_path: Path, redis_server: Redis) -> Iterator[Fleet]:
    """One worker and a scheduler on a PostgreSQL of their own."""
    server = Postgres()
    url = f"redis://:{PASSWORD}@127.0.0.1:{redis_server.port}/4"
    with fleet_of(tmp_path, url, server.url) as fleet:
        fleet.start("scheduler", "scheduler")
        fleet.start("w1", "worker", "--cpu")
        fleet.wait_for_workers(1)
        yield fleet
    server.close()


def test_a_fleet_stays_as_the_schema_grows_and_leaves_as_it_changes(
    fleet: Fleet, make_model: MakeModel, tmp_path: Path
) -> None:
    migrate(fleet.database, tmp_path, (SCHEMA_HEAD, INDEX))
    fleet.succeed(fleet.submit(make_model()))
    running, waiting = (fleet.submit(make_model(large=True))[0] for _ in range(2))
    fleet.wait_for(lambda: fleet.job(running).stage == "benchmarking", "benchmark")
    with fleet.suspended(fleet.wait_for_runner(running).runner):
        migrate(fleet.database, tmp_path, (SCHEMA_HEAD, INDEX), (AFTER_NEXT, NOT_NULL))
        fleet.wait_for(lambda: _said(fleet).startswith("takes no more jobs"), "word in the list of workers")
        until_s = 1.5 * LEASE_S
        before = fleet.job(running).lease_expires_at
        assert before is not None
        fleet.wait_for(lambda: (_lease(fleet, running) - before.timestamp()) > until_s, "renewed leases", 60.0)
    assert fleet.running.pop("w1").wait(60.0) == 3
    assert fleet.running.pop("scheduler").wait(60.0) == 3
    for name in ("w1", "scheduler"):
        last = fleet.log(name).read_text().splitlines()[-1]
        assert f"has schema {AFTER_NEXT} of a newer qbatch" in last, last
    assert len(fleet.spooled()) == 1
    assert (fleet.job(waiting).state, fleet.job(waiting).attempt) == ("queued", 0)
    # As the newer version would, whose code fills the column.
    with fleet.database.write() as session:
        fill_the_new_column(session)
    fleet.start("w1", "worker", "--cpu")
    # Before anybody takes the job back: a lease is 4 s here, and a worker's imports take longer.
    fleet.wait_for(lambda: not fleet.spooled(), "recorded result")
    fleet.start("scheduler", "scheduler")
    fleet.succeed([running, waiting])
    assert [fleet.outcomes(job) for job in (running, waiting)] == [["succeeded"]] * 2
    assert [job.failures for job in fleet.jobs([running, waiting])] == [0, 0]
    assert fleet.spooled() == []


def _said(fleet: Fleet) -> str:
    with fleet.database.read() as session:
        return session.scalars(select(Worker.note)).one() or ""


def _lease(fleet: Fleet, job_id: int) -> float:
    expires_at = fleet.job(job_id).lease_expires_at
    return expires_at.timestamp() if expires_at is not None else 0.0
