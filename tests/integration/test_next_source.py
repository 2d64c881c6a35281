"""The source of the next bundle is fetched ahead. It claims and charges nothing, and stands still for timings."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
from sqlalchemy import func, select, update

from qbatch.core.domain import DeviceKind
from qbatch.core.file_stat import Mounts, clock_ns, stat_file
from qbatch.models_db import window
from qbatch.models_db.next_bundle import find_next_bundle
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, FileDigestRow, Job, Worker
from qbatch.worker.runner.timing_pauses import TimingPauses
from qbatch.worker.serving.next_source import NextSource
from tests.rows import a_batch, a_job, a_worker, bundle, claim
from tests.tiny import make_causal
from tests.waiting import until
from tests.worker_context import a_worker_context, settings_in

_QUEUE = "qbatch.cpu"


def sent(database: Database, *models: str, priority: int = 0) -> list[list[int]]:
    """The jobs of each model, in messages that nobody has read."""
    _, ids = a_batch(database, *(bundle(model) for model in models), priority=priority)
    with database.write() as session:
        window.choose(session, kind=DeviceKind.CPU, queue=_QUEUE, slots=100)
    return [ids[start : start + 3] for start in range(0, len(ids), 3)]


def expected(database: Database, worker_id: int) -> str | None:
    with database.read() as session:
        found = find_next_bundle(session, [_QUEUE], worker_id=worker_id, lease_s=60.0)
    return None if found is None else found.source.location


def test_each_worker_expects_another_bundle_and_the_urgent_one_first(database: Database) -> None:
    first, second, third = (a_worker(database, name) for name in ("w1", "w2", "w3"))
    assert expected(database, first) is None
    ids, _ = sent(database, "/models/a", "/models/b")
    assert [expected(database, one) for one in (first, second, third)] == ["/models/a", "/models/b", None]
    sent(database, "/models/urgent", priority=5)
    assert [expected(database, one) for one in (first, second, third)] == ["/models/urgent", "/models/a", "/models/b"]
    claim(database, ids, first)
    assert expected(database, second) == "/models/b"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model whose files have settled: the checksums of others are not put on record."""
    made = make_causal(tmp_path / "llama", dtype="bfloat16")
    mounts = Mounts()
    stats = [stat_file(file, mounts) for file in made.iterdir()]
    until(lambda: all(stat.is_settled(clock_ns(stats)) for stat in stats), "the files' settling")
    return made


@pytest.fixture
def next_source(sqlite_database: Database, tmp_path: Path, source: Path) -> Iterator[NextSource]:
    settings = dataclasses.replace(settings_in(tmp_path), model_roots=(source.parent,))
    made = a_worker_context(sqlite_database, settings).next_source
    yield made
    made.close()


def served(next_source: NextSource) -> Callable[[], bool]:
    def is_over() -> bool:
        next_source.serve()
        return next_source.pid is None

    return is_over


def hashed(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(FileDigestRow)).one()


def process_of(next_source: NextSource) -> psutil.Process:
    assert next_source.pid is not None
    return psutil.Process(next_source.pid)


def test_its_files_are_on_record_and_nothing_is_claimed(
    sqlite_database: Database, next_source: NextSource, source: Path
) -> None:
    (ids,) = sent(sqlite_database, str(source))
    next_source.begin()
    until(served(next_source), "end of the fetch")
    assert hashed(sqlite_database) > 0
    found = [a_job(sqlite_database, job_id) for job_id in ids]
    assert [(job.state, job.attempt, job.failures, job.worker_id) for job in found] == [("queued", 0, 0, None)] * 3
    assert all(job.dispatch_id is not None for job in found)
    with sqlite_database.read() as session:
        assert session.scalars(select(Attempt)).all() == []
    next_source.begin()
    assert next_source.pid is None, "it was fetched"


def test_what_cannot_be_fetched_is_left_to_its_job(
    sqlite_database: Database, next_source: NextSource, source: Path
) -> None:
    (ids,) = sent(sqlite_database, str(source.parent / "not-there"))
    next_source.begin()
    until(served(next_source), "end of the fetch")
    found = [a_job(sqlite_database, job_id) for job_id in ids]
    assert [(job.state, job.error_kind) for job in found] == [("queued", None)] * 3


@pytest.mark.parametrize(("host", "is_folder"), [("here", False), ("here", True), ("there", False)])
def test_once_its_job_runs_it_goes_on_only_where_that_waits_for_it(
    sqlite_database: Database, next_source: NextSource, source: Path, host: str, is_folder: bool
) -> None:
    (ids,) = sent(sqlite_database, str(source))
    other = a_worker(sqlite_database, "w2")
    with sqlite_database.write() as session:
        session.execute(update(Worker).where(Worker.id == other).values(host=host))
        session.execute(update(Job).values(is_folder=is_folder))
    next_source.begin()
    fetching = process_of(next_source)
    fetching.suspend()
    next_source.look()
    assert next_source.pid == fetching.pid, "it still waits"
    claim(sqlite_database, ids, other)
    next_source.look()
    goes_on = host == "here" and not is_folder
    assert (next_source.pid is not None) == fetching.is_running() == goes_on
    if goes_on:
        next_source.resume()
        until(served(next_source), "end of the fetch")


def test_it_is_given_up_when_its_job_is_cancelled(
    sqlite_database: Database, next_source: NextSource, source: Path
) -> None:
    (ids,) = sent(sqlite_database, str(source))
    next_source.begin()
    process_of(next_source).suspend()
    with sqlite_database.write() as session:
        session.execute(update(Job).where(Job.id.in_(ids)).values(state="cancelled"))
    next_source.look()
    assert next_source.pid is None


def test_it_stands_still_while_something_is_timed(
    sqlite_database: Database, next_source: NextSource, source: Path
) -> None:
    sent(sqlite_database, str(source))
    next_source.begin()
    fetching = process_of(next_source)
    pauses = TimingPauses()
    with pauses.timing():
        pauses.pause_while_timing(fetching.pid)
        until(lambda: fetching.status() == psutil.STATUS_STOPPED, "its stop")
    with pauses.timing():
        until(lambda: fetching.status() == psutil.STATUS_STOPPED, "its stop")
        # The runner is killed here.
        next_source.resume()
    until(served(next_source), "end of the fetch")
    until(lambda: not fetching.is_running(), "end of its process")
    with pauses.timing():
        pass


def test_a_stopped_one_ends_with_the_forkserver(
    sqlite_database: Database, next_source: NextSource, source: Path
) -> None:
    """The kernel kills it: it cannot notice that its pipe closes."""
    sent(sqlite_database, str(source))
    next_source.begin()
    fetching = process_of(next_source)
    # It has asked for checksums, and waits.
    until(lambda: next_source._fetch is not None and next_source._fetch[2].poll(), "its first question")
    fetching.suspend()
    forkserver = fetching.parent()
    assert forkserver is not None
    forkserver.kill()
    until(lambda: not fetching.is_running() or fetching.status() == psutil.STATUS_ZOMBIE, "its end")


def test_a_stopped_one_ends_with_its_worker(sqlite_database: Database, next_source: NextSource, source: Path) -> None:
    """Whose forkserver ends when nobody holds its pipe open any more: each fork gets it too."""
    sent(sqlite_database, str(source))
    next_source.begin()
    fetching = process_of(next_source)
    until(lambda: next_source._fetch is not None and next_source._fetch[2].poll(), "its first question")
    fetching.suspend()
    # It closes the pipe, as the kernel does when the worker is killed, and waits for the forkserver.
    stopping = threading.Thread(target=forkserver._forkserver._stop)
    stopping.start()
    stopping.join(30.0)
    is_over = not stopping.is_alive()
    if not is_over:
        fetching.kill()
        stopping.join()
    assert is_over
    until(lambda: not fetching.is_running() or fetching.status() == psutil.STATUS_ZOMBIE, "its end")
