"""Several databases on one storage: nobody touches what a living worker of another one stages."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from qbatch.core.errors import StorageError, StorageUnavailable
from qbatch.core.settings import Settings
from qbatch.models_db import jobs
from qbatch.models_db.database_id import database_id
from qbatch.models_db.jobs import Token
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.worker.files.own_staging import OwnStaging
from qbatch.worker.files.staging import stage
from tests.rows import a_batch, a_worker, claim
from tests.waiting import until

# Far more than a test takes.
LEASE_S = 60.0
_HEARTBEAT = ".heartbeat"


class LoneWorker:
    """One database and its only worker, on a storage that it shares."""

    def __init__(self, database: Database, storage: Path, name: str = "w1", renew_s: float = 0.02) -> None:
        self.database = database
        with database.write() as session:
            place = Settings(home=storage, storage=storage, cache=storage).staging_of(database_id(session))
        self.staging = OwnStaging(place, name, lease_s=LEASE_S, renew_s=renew_s).start()
        self.worker_id = a_worker(database, name)

    def begin(self) -> tuple[Token, Path]:
        """An attempt that runs, and where it has begun to write."""
        _, ids = a_batch(self.database)
        (token,) = claim(self.database, ids[:1], self.worker_id)
        folder = stage(self.staging.folder, *token)
        (folder / "model.safetensors").write_bytes(b"half")
        return token, folder

    def held(self, tokens: Iterable[Token]) -> frozenset[int]:
        with self.database.read() as session:
            return jobs.held(session, tokens)

    def sweep(self, *gone: str) -> list[str]:
        return self.staging.sweep(self.held, gone=gone)

    def die(self, ago_s: float) -> None:
        """Without a word, and so long ago."""
        self.staging._closed.set()
        self.staging._thread.join()
        then = time.time() - ago_s
        os.utime(self.staging.folder / _HEARTBEAT, (then, then))


def database_in(folder: Path) -> Database:
    folder.mkdir()
    database = Database(f"sqlite:///{folder / 'qbatch.db'}")
    upgrade(database)
    return database


@pytest.fixture
def first(tmp_path: Path) -> Iterator[LoneWorker]:
    stack = LoneWorker(database_in(tmp_path / "first"), tmp_path)
    yield stack
    stack.staging.close()
    stack.database.dispose()


def test_two_stacks_with_equal_database_urls_leave_each_other_alone(first: LoneWorker, tmp_path: Path) -> None:
    """Two containers: the paths in them are the same, and neither has a machine id."""
    second = LoneWorker(database_in(tmp_path / "second"), tmp_path)
    token, folder = first.begin()
    assert second.held([token]) == frozenset()
    first.die(ago_s=1e6)
    assert second.sweep() == []
    assert (folder / "model.safetensors").exists(), "the other database's, dead or alive"
    second.staging.close()
    second.database.dispose()


def test_a_copied_database_leaves_alone_what_living_workers_stage(first: LoneWorker, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    first.database.dispose()  # with its last connection, all that it holds is in its one file
    shutil.copy(tmp_path / "first" / "qbatch.db", tmp_path / "copy" / "qbatch.db")
    token, folder = first.begin()
    copy = LoneWorker(Database(f"sqlite:///{tmp_path / 'copy' / 'qbatch.db'}"), tmp_path, "w2")
    assert copy.staging.parent == first.staging.parent, "the copy brought the id along"
    assert copy.held([token]) == frozenset(), "and knows nothing of what was begun since"
    assert copy.sweep() == []
    assert (folder / "model.safetensors").exists()
    first.die(ago_s=3 * LEASE_S)
    assert copy.sweep() == [folder.name]
    assert not first.staging.folder.exists()
    copy.staging.close()
    copy.database.dispose()


def test_a_dead_workers_attempts_are_removed_unless_they_hold_their_jobs(first: LoneWorker, tmp_path: Path) -> None:
    (token, running), (_, over) = first.begin(), first.begin()
    second = LoneWorker(first.database, tmp_path, "w2")
    with first.database.write() as session:
        jobs.hand_back(session, [(int(over.name.split("-")[0]), 1)])
    assert second.sweep() == [], "its worker may be about to clear it"
    first.die(ago_s=3 * LEASE_S)
    assert second.sweep() == [over.name]
    assert running.exists()
    with first.database.write() as session:
        jobs.hand_back(session, [token])
    assert second.sweep() == [running.name]
    assert not first.staging.folder.exists()
    second.staging.close()


def test_a_worker_known_to_be_dead_is_not_waited_for(first: LoneWorker, tmp_path: Path) -> None:
    token, folder = first.begin()
    second = LoneWorker(first.database, tmp_path, "w2")
    first.die(ago_s=0.0)
    with first.database.write() as session:
        jobs.hand_back(session, [token])
    assert second.sweep() == []
    assert second.sweep("w1") == [folder.name]
    second.staging.close()


def test_a_worker_clears_what_its_own_killed_runners_left(first: LoneWorker) -> None:
    token, folder = first.begin()
    assert first.sweep() == []
    with first.database.write() as session:
        jobs.hand_back(session, [token])
    assert first.sweep() == [folder.name]


def test_a_heartbeat_is_valid_for_the_time_written_in_it(first: LoneWorker, tmp_path: Path) -> None:
    second = LoneWorker(first.database, tmp_path, "w2")
    _, folder = first.begin()
    first.die(ago_s=100.0)
    heartbeat = first.staging.folder / _HEARTBEAT
    assert second.staging.sweep(lambda _: []) == []
    then = heartbeat.stat().st_mtime
    heartbeat.write_text("{")
    os.utime(heartbeat, (then, then))
    assert second.staging.sweep(lambda _: []) == [], "what cannot be read stands for an hour"
    heartbeat.write_text('{"dead_after_s": 50}')
    os.utime(heartbeat, (then, then))
    assert second.staging.sweep(lambda _: []) == [folder.name]
    second.staging.close()


def test_a_staging_folder_that_was_removed_is_created_again(first: LoneWorker, tmp_path: Path) -> None:
    # At once: while files are removed one by one, the next heartbeat may come among them.
    first.staging.folder.rename(tmp_path / "removed")
    until((first.staging.folder / _HEARTBEAT).exists, "heartbeat")


def test_a_worker_that_stops_removes_its_folder(tmp_path: Path) -> None:
    staging = OwnStaging(tmp_path / "place", "w1", lease_s=LEASE_S, renew_s=60.0).start()
    stage(staging.folder, 1, 1)
    staging.close()
    assert list((tmp_path / "place").iterdir()) == []


def test_a_storage_that_takes_no_heartbeat_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailable, match=r"file.*: Not a directory"):
        OwnStaging(tmp_path / "file", "w1", lease_s=LEASE_S, renew_s=1.0).start()
    staging = OwnStaging(tmp_path / "place", "w1", lease_s=LEASE_S, renew_s=60.0).start()
    shutil.rmtree(tmp_path / "place")
    (tmp_path / "place").write_text("")
    with pytest.raises(StorageError, match="cannot clean up the staging folder"):
        staging.sweep(lambda _: [])


def test_a_worker_starts_and_sweeps_on_a_storage_that_is_full(
    first: LoneWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, folder = first.begin()
    first.die(ago_s=3 * LEASE_S)
    with first.database.write() as session:
        jobs.hand_back(session, [token])

    def mkdir(path: str, mode: int = 0o777) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    with monkeypatch.context() as full:
        full.setattr(os, "mkdir", mkdir)
        second = OwnStaging(first.staging.parent, "w2", lease_s=LEASE_S, renew_s=0.02).start()
        assert second.sweep(first.held) == [], "nobody can say how late it is"
        assert second.sweep(first.held, gone={"w1"}) == [folder.name], "but of a process that is gone all goes"
    until((second.folder / _HEARTBEAT).exists, "heartbeat, as soon as there is room")
    second.close()


def test_a_database_id_is_created_once_and_is_unique(database: Database, tmp_path: Path) -> None:
    with database.read() as session:
        made = database_id(session)
    with database.read() as session:
        assert database_id(session) == made
    other = database_in(tmp_path / "other")
    with other.read() as session:
        assert database_id(session) != made
    other.dispose()
