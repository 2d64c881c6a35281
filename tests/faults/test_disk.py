"""A storage without room: one clear line, nothing half written, and bundles are sent again as soon as there is room."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.domain import Method, Stage
from qbatch.core.errors import DiskFull, JobError
from qbatch.core.retry_policy import RetryLimits
from qbatch.models_db import jobs
from qbatch.models_db.pauses import in_force, lift
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Pause
from qbatch.worker.checkpoints.published import problems
from tests.acceptance.conftest import Qbatch, await_end_of
from tests.chaos.processes import Role, family_of, has_an_order
from tests.faults.conftest import MakeModel
from tests.faults.fleet import LEASE_S, PACE, Fleet
from tests.rows import a_batch, a_worker, bundle, claim
from tests.waiting import until

_STORAGE_BYTES = 16 * 2**20
_LEFT_BYTES = 4 * 2**20
# Several within a test: nothing is tried anew after each of them.
_BACKOFF_S = 2.0


class SmallDisk:
    """``qbatch up`` where ``place`` is a tmpfs of ``nbytes`` that only it and its children see."""

    def __init__(self, folder: Path, place: Path, nbytes: int, **env: str) -> None:
        self._place = place
        self._place.mkdir()
        self.qbatch = Qbatch(folder / "home", PACE | env)
        script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
        namespace = private_mounts()
        self._enter = ["nsenter", "--mount"]
        if "--map-root-user" in namespace:
            self._enter += ["--user", "--preserve-credentials"]
        argv = [*namespace, "sh", "-c", script, "sh", str(nbytes), str(self._place)]
        with (folder / "up.log").open("wb") as log:
            self.up = subprocess.Popen(
                [*argv, *Fleet.program, "up", "--cpu"],
                env=self.qbatch.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def root(self) -> Path:
        """The disk as its own processes see it."""
        return self.seen(self._place)

    def seen(self, path: Path) -> Path:
        return Path(f"/proc/{self.up.pid}/root{path}")

    def json(self, *args: str) -> Any:
        """What a command says to whom sees the disk."""
        argv = [*self._enter, "--target", str(self.up.pid), *Fleet.program, *args, "--json"]
        done = subprocess.run(argv, env=self.qbatch.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    def fill(self, leave_bytes: int) -> Path:
        ballast = self.root / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free_bytes() - leave_bytes)
        return ballast

    def top_up(self, ballast: Path) -> None:
        """Take all that is left, whoever else writes or deletes meanwhile."""
        with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def close(self) -> None:
        self.up.send_signal(signal.SIGINT)
        assert self.up.wait(60.0) == 0
        await_end_of(self.qbatch.home)


class SmallStorage(SmallDisk):
    """A storage of 16 MiB; home and database have room."""

    def __init__(self, folder: Path) -> None:
        place = folder / "storage"
        super().__init__(folder, place, _STORAGE_BYTES, QBATCH_STORAGE=str(place), QBATCH_BACKOFF_S=str(_BACKOFF_S))
        until((self.qbatch.home / "qbatch.db").exists, "database")
        self.qbatch.wait_for_worker()  # the database has its tables by then
        self.fleet = Fleet(self.qbatch, Database(f"sqlite:///{self.qbatch.home / 'qbatch.db'}"))

    def close(self) -> None:
        super().close()
        self.fleet.close()


def private_mounts() -> list[str]:
    """How to start a program that may mount something for itself alone."""
    for argv in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        attempt = subprocess.run([*argv, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
        if attempt.returncode == 0:
            return argv
    raise AssertionError("a small storage is a tmpfs in a mount namespace, and this machine allows none")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallStorage]:
    storage = SmallStorage(tmp_path)
    yield storage
    storage.close()


def test_a_full_storage_pauses_what_is_sent_until_there_is_room(small: SmallStorage, make_model: MakeModel) -> None:
    fleet = small.fleet
    (earlier,) = fleet.submit(make_model())
    fleet.succeed([earlier])
    ballast = small.fill(_LEFT_BYTES)
    (large,) = fleet.submit(make_model(large=True))
    fleet.wait_for(lambda: fleet.outcomes(large) == ["disk_full"], "disk_full")
    (other,) = fleet.submit(make_model())
    message = "the checkpoint needs 11.2 MiB, and the storage has 4.0 MiB left"
    job = fleet.job(large)
    assert (job.state, job.failures, job.error_message) == ("queued", 0, message)
    (pause,) = _pauses(fleet.database)
    assert pause.needed_bytes is not None
    assert _LEFT_BYTES < pause.needed_bytes < _STORAGE_BYTES
    said = f"no jobs are sent to the workers until disk space is free: j{large}: {message}"
    assert said in fleet.qbatch("status").stderr
    assert "dispatch has been paused since" in fleet.qbatch("doctor", code=1).stdout
    assert list(small.root.glob(".staging/*/*/*-*")) == []
    (published,) = small.root.glob("checkpoints/*/*")
    assert problems(published) == [], "what was published before is as it was"
    time.sleep(3 * _BACKOFF_S)
    assert (fleet.job(other).state, fleet.job(other).attempt) == ("queued", 0), "nothing was sent meanwhile"
    assert fleet.outcomes(large) == ["disk_full"], "nor did anyone look whether there is room by trying"
    (still,) = _pauses(fleet.database)
    assert still.since == pause.since
    ballast.unlink()
    fleet.succeed([large, other])
    assert _pauses(fleet.database) == []
    assert fleet.qbatch("status").stderr == ""
    assert fleet.job(large).failures == 0
    assert fleet.outcomes(large) == ["disk_full", "succeeded"]


def test_cancelling_the_job_that_needs_space_ends_the_pause(small: SmallStorage, make_model: MakeModel) -> None:
    fleet = small.fleet
    small.fill(_LEFT_BYTES)
    (large,) = fleet.submit(make_model(large=True))
    fleet.wait_for(lambda: fleet.outcomes(large) == ["disk_full"], "disk_full")
    (other,) = fleet.submit(make_model())
    time.sleep(2 * _BACKOFF_S)
    assert fleet.job(other).attempt == 0
    assert fleet.qbatch("cancel", f"j{large}").returncode == 0
    fleet.succeed([other])
    assert _pauses(fleet.database) == []


def test_a_result_due_while_no_disk_has_room_is_recorded_once_one_has(tmp_path: Path, make_model: MakeModel) -> None:
    """Database, spool, storage and logs share one disk, and it is full for some leases."""
    home = tmp_path / "home"
    disk = SmallDisk(tmp_path, home, 64 * 2**20)
    try:
        until(disk.seen(home / "qbatch.db").exists, "database")
        until(lambda: any(row["state"] == "ready" for row in disk.json("workers")), "live worker", poll_s=1.0)
        listed = tmp_path / "models.txt"
        listed.write_text(str(make_model(large=True)))
        disk.json("submit", "--models", str(listed), "--bits", "4", "--no-baseline", "--new-tokens", "96")
        until(lambda: any(disk.root.glob("storage/checkpoints/*/*")), "published checkpoint")
        ballast = disk.root / "ballast"
        disk.top_up(ballast)
        until(
            lambda: disk.top_up(ballast) or not any(map(has_an_order, family_of(home)[Role.RUNNER])),
            "end of the runner's work",
        )
        over = time.monotonic() + 3 * LEASE_S
        until(lambda: disk.top_up(ballast) or time.monotonic() > over)
        assert [job["state"] for job in disk.json("jobs")] == ["running"], "nobody could say more"
        ballast.unlink()
        until(lambda: [job["state"] for job in disk.json("jobs")] != ["running"], "end of the job", poll_s=1.0)
        (job,) = disk.json("show", "j1")
        assert (job["state"], job["failures"]) == ("succeeded", 0)
        assert [attempt["outcome"] for attempt in job["attempts"]] == ["succeeded"]
    finally:
        disk.close()


def test_a_full_storage_is_one_pause_and_a_full_cache_is_none(database: Database) -> None:
    _, ids = a_batch(database, bundle("/models/a", Method.NF4), bundle("/models/b", Method.NF4))
    worker = a_worker(database)
    first, second = claim(database, ids, worker)
    _fail(database, first, DiskFull("the source cache is full"), backoff_s=60.0)
    assert _pauses(database) == [], "that is one machine's, and says nothing of the storage"
    with database.write() as session:
        jobs.note(session, second, stage=Stage.QUANTIZING)
    _fail(database, second, DiskFull("no room", 7), backoff_s=60.0)
    (pause,) = _pauses(database)
    assert (pause.reason, pause.message, pause.needed_bytes) == ("storage_full", f"j{ids[1]}: no room", 7)
    (third,) = claim(database, [ids[1]], worker)
    with database.write() as session:
        jobs.note(session, third, stage=Stage.QUANTIZING)
    _fail(database, third, DiskFull("still no room"), backoff_s=120.0)
    (longer,) = _pauses(database)
    assert longer.since == pause.since
    assert longer.until > pause.until
    assert longer.needed_bytes is None
    with database.write() as session:
        lift(session, longer.reason)
    assert _pauses(database) == []


def _fail(database: Database, token: jobs.Token, error: JobError, *, backoff_s: float) -> None:
    with database.write() as session:
        assert jobs.fail(session, token, error, limits=RetryLimits(backoff_s=backoff_s, max_failures=3), lease_s=60.0)


def _pauses(database: Database) -> list[Pause]:
    with database.read() as session:
        found = list(in_force(session))
        session.expunge_all()
        return found


# What outgrows the room that there was when it began: the weights fit, the tokenizer beside them does not.
_OUTGROW = """
import json, sys
from pathlib import Path
from qbatch.core.errors import JobError
from tests.unit.test_checkpoint import PATH, put, staged
from qbatch.worker.checkpoints.published import problems
from qbatch.worker.files.staging import unstage

storage, source = Path(sys.argv[1]), Path(sys.argv[2])
put(staged(storage, 1), storage, source)
(source / "tokenizer.json").write_bytes(bytes(700_000))
folder = staged(storage, 2, weights=bytes(600_000))
try:
    put(folder, storage, source)
    said = None
except JobError as error:
    said = [error.kind, str(error)]
unstage(folder)
left = [str(path) for path in storage.glob(".staging/*")]
print(json.dumps({"said": said, "left": left, "problems": problems(storage / PATH)}))
"""


def test_a_disk_that_fills_up_during_a_write_costs_only_what_was_begun(tmp_path: Path) -> None:
    storage, source = tmp_path / "storage", tmp_path / "source"
    storage.mkdir()
    source.mkdir()
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"'
    argv = [*private_mounts(), "sh", "-c", script, "sh", str(storage)]
    done = subprocess.run(
        [*argv, sys.executable, "-c", _OUTGROW, str(storage), str(source)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "said": ["disk_full", f"cannot publish: No space left on device ({storage}/.staging/2-1/tokenizer.json)"],
        "left": [],
        "problems": [],
    }
