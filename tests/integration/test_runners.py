"""A runner stands by for the next bundle. Whatever happens to it, that bundle gets a runner."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from qbatch.core.domain import DeviceKind
from qbatch.models_db.batches import add_text
from qbatch.models_db.session import Database
from qbatch.worker.runner.messages import Ended, Order
from qbatch.worker.serving.celery_task import _run_bundle
from qbatch.worker.serving.runner_forkserver import PRELOADED
from qbatch.worker.serving.runners import Runners
from qbatch.worker.serving.supervisor import WorkerContext
from qbatch.worker.sources.source_policy import SourcePolicy
from tests.rows import PROTOCOL, a_batch, a_job, bundle
from tests.waiting import until
from tests.worker_context import a_worker_context, settings_in


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> Iterator[None]:
    """A forkserver of this file's own, which has imported what runners need: by themselves each would for seconds."""
    stop_forkserver()
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED[DeviceKind.CPU]))
    yield
    stop_forkserver()
    multiprocessing.get_context("forkserver").set_forkserver_preload([])


def stop_forkserver() -> None:
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def runners() -> Iterator[Runners]:
    made = Runners(multiprocessing.get_context("forkserver"), DeviceKind.CPU)
    yield made
    made.close()


@pytest.fixture
def order(tmp_path: Path) -> Order:
    """Nothing to do."""
    return Order(
        claims=(),
        texts={},
        device_kind=DeviceKind.CPU,
        device_name="a CPU",
        storage=tmp_path,
        staging=tmp_path,
        cache=tmp_path,
        cache_bytes=0,
        policy=SourcePolicy(roots=None),
        lease_s=60.0,
        log_path=tmp_path / "log",
    )


def standing_by(runners: Runners) -> psutil.Process:
    assert runners._standby is not None
    pid = runners._standby[0].pid
    assert pid is not None
    return psutil.Process(pid)


def suspended_before_it_is_ready(runners: Runners) -> psutil.Process:
    for _ in range(20):
        runners.stand_by()
        caught = standing_by(runners)
        caught.suspend()
        until(lambda caught=caught: caught.status() == psutil.STATUS_STOPPED, "stopped runner")  # type: ignore[misc]
        assert runners._standby is not None
        if not runners._standby[1].poll():
            return caught
        # It was quicker.
        runners.close()
    raise AssertionError("each runner was ready before it could be suspended")


def await_ready(runners: Runners) -> None:
    """On a busy machine one is prepared later than a bundle waits for it."""
    assert runners._standby is not None
    assert runners._standby[1].poll(60.0)


def finish(process: BaseProcess, connection: Connection) -> None:
    """Let a runner end, as a supervisor does."""
    while not isinstance(connection.recv(), Ended):
        pass
    connection.close()
    process.join(10.0)
    assert process.exitcode == 0


def test_the_one_that_stands_by_gets_the_order(runners: Runners, order: Order) -> None:
    runners.stand_by()
    ready = standing_by(runners)
    runners.stand_by()
    assert standing_by(runners) == ready, "one is enough"
    await_ready(runners)
    process, connection = runners.start(order)
    assert process.pid == ready.pid
    finish(process, connection)


def test_without_one_a_new_one_is_started(runners: Runners, order: Order) -> None:
    finish(*runners.start(order))


@pytest.mark.parametrize("is_noticed", [True, False])
def test_one_that_is_killed_is_replaced(runners: Runners, order: Order, is_noticed: bool) -> None:
    runners.stand_by()
    killed = standing_by(runners)
    until(lambda: runners._standby is not None and runners._standby[1].poll(), "word that it is ready")
    killed.kill()
    until(lambda: not killed.is_running(), "its end")
    if is_noticed:
        runners.stand_by()
    process, connection = runners.start(order)
    assert process.pid != killed.pid
    finish(process, connection)


def test_one_that_does_not_get_ready_is_given_up(
    runners: Runners, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its device may not answer."""
    monkeypatch.setattr("qbatch.worker.serving.runners._READY_S", 0.0)
    stuck = suspended_before_it_is_ready(runners)
    process, connection = runners.start(order)
    assert process.pid != stuck.pid
    until(lambda: not stuck.is_running(), "its end")
    finish(process, connection)


def test_it_ends_with_its_worker(runners: Runners) -> None:
    runners.stand_by()
    ready = standing_by(runners)
    assert runners._standby is not None
    runners._standby[1].close()
    until(lambda: not ready.is_running(), "its end")


def test_a_bundle_leaves_a_runner_for_the_next(sqlite_database: Database, tmp_path: Path) -> None:
    context = a_worker_context(sqlite_database, settings_in(tmp_path))
    try:
        run_a_bundle(context, tmp_path)
        ready = standing_by(context.runners)
        run_a_bundle(context, tmp_path)
        assert not ready.is_running(), "it was the second bundle's"
        context.stopping.set()
    finally:
        context.runners.close()


def run_a_bundle(context: WorkerContext, folder: Path) -> None:
    """One whose model is not in the storage."""
    _, ids = a_batch(context.database, bundle(str(folder / "no-model")))
    with context.database.write() as session:
        add_text(session, PROTOCOL.eval_text_sha256, "It was a quiet evening.")
    with pytest.raises(Exception, match=rf"j{ids[0]}"):
        _run_bundle(context, "4b1de4d2-0000-4000-8000-000000000000", ids)
    assert [a_job(context.database, job_id).error_kind for job_id in ids] == ["unsafe_source"] * len(ids)
