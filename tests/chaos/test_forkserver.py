"""A forkserver that is killed while it starts a runner costs nobody anything."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from qbatch.core.domain import DeviceKind
from qbatch.core.errors import ForkserverKilled
from qbatch.core.settings import Settings
from qbatch.models_db.batches import add_text
from qbatch.models_db.jobs import claim
from qbatch.models_db.session import Database
from qbatch.scheduler.child_process import FINAL, REFUSALS
from qbatch.scheduler.stop import Stop
from qbatch.worker.serving.next_source import NextSource
from qbatch.worker.serving.recorder import Recorder
from qbatch.worker.serving.runner_forkserver import await_imports, begin_imports
from qbatch.worker.serving.runners import Runners
from qbatch.worker.serving.supervisor import Supervisor, WorkerContext
from tests.rows import PROTOCOL, a_batch, a_job, a_worker, bundle
from tests.waiting import until


def test_a_new_forkserver_starts_the_runner_over_which_the_old_one_died(
    sqlite_database: Database, tmp_path: Path, told_to_end: list[int]
) -> None:
    environ = {"QBATCH_HOME": str(tmp_path), "QBATCH_DATABASE_URL": f"sqlite:///{tmp_path / 'qbatch.db'}"}
    settings = Settings.from_env(environ)
    worker_id = a_worker(sqlite_database)
    _, ids = a_batch(sqlite_database, bundle(str(tmp_path / "no-model")))
    with sqlite_database.write() as session:
        add_text(session, PROTOCOL.eval_text_sha256, "It was a quiet evening.")
        claims = claim(session, ids, worker_id, settings.lease_s)
    processes = multiprocessing.get_context("forkserver")
    forkserver = _started(processes)
    forkserver.suspend()
    runners = Runners(processes, DeviceKind.CPU)
    context = WorkerContext(
        database=sqlite_database,
        settings=settings,
        recorder=Recorder(sqlite_database, settings),
        worker_id=worker_id,
        device_kind=DeviceKind.CPU,
        device_name="a CPU",
        staging=settings.staging,
        runners=runners,
        next_source=NextSource(
            database=sqlite_database, settings=settings, runners=runners, worker_id=worker_id, queues=("qbatch.cpu",)
        ),
        stopping=Stop(),
    )
    supervisor = threading.Thread(target=Supervisor(context, claims).run)
    supervisor.start()
    time.sleep(1.0)  # its request stands before a forkserver that does not answer
    assert supervisor.is_alive()
    forkserver.kill()
    supervisor.join(120.0)
    assert not supervisor.is_alive()
    # A runner looked for the model, and said what it found.
    assert [a_job(sqlite_database, job_id).error_kind for job_id in ids] == ["source_not_found"] * 3
    assert _forkservers() != [forkserver]
    assert told_to_end == []
    _end()


def test_a_worker_whose_first_runner_is_killed_does_not_refuse_to_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forkserver is killed when it has been asked for the runner: before that, another one would be started."""
    _end()
    asked, connect = threading.Event(), forkserver.connect_to_new_process

    def ask(descriptors: list[int]) -> tuple[int, int]:
        answer = connect(descriptors)
        asked.set()
        return answer

    monkeypatch.setattr(forkserver, "connect_to_new_process", ask)
    environ = {"QBATCH_HOME": str(tmp_path), "QBATCH_DATABASE_URL": f"sqlite:///{tmp_path / 'qbatch.db'}"}
    with ThreadPoolExecutor(1) as executor:
        context = begin_imports(Settings.from_env(environ), DeviceKind.CPU)
        preloading = executor.submit(await_imports, context)
        assert asked.wait(120.0)
        _end()
        with pytest.raises(ForkserverKilled) as error:
            preloading.result(60.0)
    # The launcher restarts a worker with this exit code.
    assert error.value.exit_code not in (*REFUSALS, FINAL)
    _end()


@pytest.fixture
def told_to_end() -> Iterator[list[int]]:
    """The signals with which a supervisor that could start no runner ended its worker: here, this process."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def _started(context: multiprocessing.context.ForkServerContext) -> psutil.Process:
    _end()
    first = context.Process(target=_do_nothing)
    first.start()
    first.join()
    (forkserver,) = _forkservers()
    return forkserver


def _do_nothing() -> None:
    return None


def _forkservers() -> list[psutil.Process]:
    living = (child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE)
    return [child for child in living if "forkserver import" in " ".join(child.cmdline())]


def _end() -> None:
    for process in _forkservers():
        process.kill()
        # Not waited for: that it ended is multiprocessing's to find out.
        until(lambda process=process: _has_ended(process), "end of a forkserver")  # type: ignore[misc]


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
