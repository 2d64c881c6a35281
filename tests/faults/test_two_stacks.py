"""Two stacks on one storage whose databases cannot be told apart by name, one a copy of the other."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from qbatch.core.domain import Stage
from tests.faults.conftest import MakeModel, fleet_of
from tests.faults.fleet import LEASE_S
from tests.faults.fleet_services import PASSWORD, Redis


def test_a_stack_on_a_copied_database_costs_the_first_one_nothing(
    tmp_path: Path, redis_server: Redis, make_model: MakeModel
) -> None:
    storage = {"QBATCH_STORAGE": str(tmp_path / "storage")}
    brokers = [f"redis://:{PASSWORD}@127.0.0.1:{redis_server.port}/{number}" for number in (1, 2)]
    with (
        fleet_of(tmp_path / "first", brokers[0], **storage) as first,
        fleet_of(tmp_path / "copy", brokers[1], **storage) as copy,
    ):
        for fleet in (first, copy):
            # As in two containers: the same words for another file.
            fleet.qbatch.env["QBATCH_DATABASE_URL"] = "sqlite:///qbatch.db"
            fleet.qbatch.cwd = fleet.qbatch.home
        first.start("w1", "worker", "--cpu")
        first.wait_for_workers(1)
        first.stop("w1")
        copy.database.dispose()
        first.database.dispose()
        shutil.copy(first.qbatch.home / "qbatch.db", copy.qbatch.home / "qbatch.db")
        first.start("w1", "worker", "--cpu")
        first.start("scheduler", "scheduler")
        first.wait_for_workers(1)
        (job,) = first.submit(make_model(large=True))
        caught = first.catch(job, Stage.QUANTIZING, once=first.staged)
        staged = first.staged()
        assert len(staged) == 1
        copy.start("w1", "worker", "--cpu")
        copy.wait_for_workers(1)
        time.sleep(2 * LEASE_S)  # it sweeps when it starts, and after every lease
        assert first.staged() == staged
        caught.runner.resume()
        first.succeed([job])
        assert first.outcomes(job)[-1] == "succeeded"
        assert first.job(job).attempt == caught.attempt
        assert first.job(job).failures == caught.attempt - 1, "but what it took to catch it"
