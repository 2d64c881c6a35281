"""Checkpoints that are removed while workers want them, and removals that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qbatch.core.domain import Method
from qbatch.core.settings import Settings
from qbatch.models_db import checkpoints, jobs
from qbatch.models_db.session import Database
from qbatch.worker.checkpoints import published
from qbatch.worker.checkpoints.ownership import adopters
from qbatch.worker.checkpoints.published import find_published, problems
from qbatch.worker.housekeeping.checkpoint_remover import StoredCheckpoint, remover
from qbatch.worker.housekeeping.garbage import collect_garbage
from qbatch.worker.housekeeping.stale_files import aside_of
from tests.rows import a_batch, a_worker, bundle, claim
from tests.stored_checkpoints import a_measured_batch, identity_of, key_of, put_checkpoint, set_key
from tests.waiting import until

_ROUNDS = 12
_FILES = 20_000


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings.from_env({"QBATCH_HOME": str(tmp_path)})
    settings.storage.mkdir(parents=True)
    return settings


def test_what_a_worker_adopts_at_that_moment_is_not_removed(database: Database, settings: Settings) -> None:
    """A worker notes a job's key before it looks. Whoever of the two is first, it has a whole checkpoint or none."""
    own = identity_of(database)
    a_measured_batch(database, settings, "org/a")
    key, worker = key_of("org/a"), a_worker(database)
    one = StoredCheckpoint(path=f"checkpoints/a/bnb-nf4-{key[:16]}", key=key, method=Method.NF4)
    seen = set()
    for round_ in range(_ROUNDS):
        put_checkpoint(settings, "org/a", database=own)
        # That of another model, until the worker knows better.
        _, ids = a_batch(database, bundle("org/b", Method.NF4))
        (token,) = claim(database, ids, worker)
        start = threading.Barrier(2)

        def adopt(job_id: int = token[0], start: threading.Barrier = start) -> bool:
            start.wait()
            set_key(database, job_id, key)
            return find_published(settings.storage, one.path, key, database=own) is not None

        with ThreadPoolExecutor(1) as pool:
            adopting = pool.submit(adopt)
            start.wait()
            threading.Event().wait(0.002 * (round_ % 6))
            kept = remover(database, settings).remove(one) if (settings.storage / one.path).exists() else "gone"
            adopted = adopting.result()
        seen.add(adopted)
        assert not (adopted and kept is None)
        assert (settings.storage / one.path).is_dir() == (kept is not None and kept != "gone"), "not taken for damaged"
        if adopted:
            assert problems(settings.storage / one.path) == []
        with database.write() as session:
            jobs.cancel(session, job_ids=ids)
            checkpoints.note_presence(session, gone=(), present=[one.path])
    assert not list(settings.checkpoints.glob("*/.*.removed-*"))
    assert seen, "who is first depends on the machine"


def test_another_database_marks_what_was_moved_back_at_that_moment(
    sqlite_database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker comes while the checkpoint is moved aside, and goes on when it is back."""
    made = a_measured_batch(sqlite_database, settings, "org/a")
    other, aside = str(uuid.uuid4()), aside_of(made.folders[0], identity_of(sqlite_database))
    made.folders[0].rename(aside)
    real = published._identity

    def moved_back(folder: Path) -> tuple[int, int] | None:
        if aside.exists():
            aside.rename(folder)
        return real(folder)

    monkeypatch.setattr(published, "_identity", moved_back)
    found = published.find_published(settings.storage, made.paths[0], key_of("org/a"), database=other)
    assert found is None or adopters(settings.storage, made.paths[0], identity_of(sqlite_database)) == [other]


def test_a_killed_removal_is_finished_by_the_next_gc(sqlite_database: Database, settings: Settings) -> None:
    made = a_measured_batch(sqlite_database, settings, "org/a")
    beside = made.folders[0] / "beside"
    beside.mkdir()
    for number in range(_FILES):
        (beside / str(number)).touch()
    environ = os.environ | {"QBATCH_HOME": str(settings.home)}
    command = [sys.executable, "-m", "qbatch", "rm", made.paths[0], "--yes"]
    removing = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE)
    until(lambda: list(settings.checkpoints.glob("*/.*.removed-*")), "removal", timeout_s=60)
    half = list(settings.checkpoints.glob("*/.*.removed-*"))
    removing.send_signal(signal.SIGKILL)
    removing.communicate()
    assert removing.returncode == -signal.SIGKILL
    assert half[0].is_dir()
    assert not made.folders[0].exists()
    collect_garbage(sqlite_database, settings, 1.0, dry_run=False)
    assert not half[0].exists()
    with sqlite_database.read() as session:
        (row,) = checkpoints.all_checkpoints(session)
        assert row.gone_at is not None
