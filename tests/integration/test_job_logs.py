"""``qbatch logs``: the log of a job from any machine that sees the storage, and why there is none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import update

from qbatch.cli import main
from qbatch.core.domain import JobState
from qbatch.core.errors import WorkerLost
from qbatch.core.job_log import job_log
from qbatch.core.settings import Settings
from qbatch.models_db.database_id import database_id
from qbatch.models_db.jobs.ending import end
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from qbatch.models_db.watching import Watcher
from qbatch.scheduler.job_log_tail import Follower, status_of
from qbatch.views.live import describe_failure
from tests.rows import a_batch, a_worker, claim, fail, succeed
from tests.waiting import until

Run = Callable[..., Result]
_AT_ONCE = update(Job).values(not_before=None)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, storage=tmp_path / "storage", cache=tmp_path / "cache")


@pytest.fixture
def run(sqlite_database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("QBATCH_HOME", str(settings.home))
    assert sqlite_database.file == settings.home / "qbatch.db"

    def invoke(*arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(main, list(arguments))
        assert done.exit_code == code, done.output
        return done

    return invoke


def log_of(database: Database, settings: Settings, job_id: int, attempt: int) -> Path:
    with database.read() as session:
        path = job_log(settings.logs_of(database_id(session)), job_id, attempt)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def fail_once(database: Database, worker: int, job: int) -> None:
    with database.write() as session:
        session.execute(_AT_ONCE)
    (token,) = claim(database, [job], worker)
    fail(database, token, WorkerLost("it was killed"))


def test_each_attempt_has_its_log(sqlite_database: Database, settings: Settings, run: Run) -> None:
    _, (job, *_) = a_batch(sqlite_database)
    worker = a_worker(sqlite_database)
    for number in (1, 2):
        log_of(sqlite_database, settings, job, number).write_text(f"line {number}\n\x1b[2J\n")
        fail_once(sqlite_database, worker, job)
    shown = run("logs", "j1")
    assert shown.stdout == "line 2\n\\x1b[2J\n"
    assert "j1, attempt 2 ended: worker_lost: it was killed" in shown.stderr
    assert "other attempts: 1 (show one with --attempt)" in shown.stderr
    assert run("logs", "j1", "--attempt", "1").stdout.startswith("line 1\n")
    refused = run("logs", "j1", "--attempt", "3", code=2)
    assert "j1 has no attempt 3; its attempts are 1, 2" in refused.stderr


def test_where_there_is_no_log_the_reason_is_said(sqlite_database: Database, run: Run) -> None:
    _, (job, *_) = a_batch(sqlite_database)
    assert "no worker has begun j1, so it has no log yet" in run("logs", "j1", code=2).stderr
    assert "'b1' is not a job id" in run("logs", "b1", code=2).stderr
    assert "no such job: j99" in run("logs", "j99", code=2).stderr
    run("cancel", "j2")
    assert "no worker had begun it when it was cancelled" in run("logs", "-f", "j2", code=2).stderr
    claim(sqlite_database, [job], a_worker(sqlite_database))
    missing = run("logs", "j1", code=3).stderr
    assert "j1-1.log" in missing
    assert "does not see the storage" in missing
    assert "`qbatch gc` or `qbatch prune` removed it" in missing


def test_show_and_every_failure_name_the_log(sqlite_database: Database, settings: Settings, run: Run) -> None:
    _, (job, *_) = a_batch(sqlite_database)
    assert "qbatch logs" not in run("show", "j1").stdout
    worker = a_worker(sqlite_database)
    for number in (1, 2, 3):
        fail_once(sqlite_database, worker, job)
        assert str(log_of(sqlite_database, settings, job, number)) in run("show", "j1").stdout
    assert "failed: worker_lost: it was killed (see `qbatch logs j1`)" in run("show", "j1").stdout
    assert "(see `qbatch logs j1`)" in run("results").stdout
    assert "(see `qbatch logs j1`)" in run("jobs").stdout
    assert "qbatch logs" not in run("jobs", "--state", "queued").stdout


def test_a_failure_of_a_job_that_nobody_has_begun_names_no_log(sqlite_database: Database, run: Run) -> None:
    """Such as that of a search that an earlier one answers, whose first mixture cannot be published."""
    a_batch(sqlite_database)
    with sqlite_database.write() as session:
        end(session, session.get_one(Job, 1), JobState.FAILED, WorkerLost("j2, which publishes what it found, failed"))
    for command in (["show", "j1"], ["results"], ["results", "--columns", "decode"], ["jobs"], ["compare"]):
        said = run(*command).stdout
        assert "j2, which publishes" in " ".join(said.split()), command
        assert "qbatch logs" not in said, command
    with sqlite_database.read() as session:
        (news,) = Watcher([1], lease_s=60.0).look(session).news
    assert describe_failure([news], news.job_id).endswith("j2, which publishes what it found, failed")


def test_a_follower_goes_from_attempt_to_attempt(sqlite_database: Database, settings: Settings) -> None:
    _, (job, *_) = a_batch(sqlite_database)
    worker = a_worker(sqlite_database)
    seen: list[bytes] = []
    said: list[str] = []
    look = partial(status_of, sqlite_database, settings.logs_of, job)
    follower = Follower(look=look, say=said.append)
    thread = threading.Thread(target=lambda: seen.extend(follower.follow()))
    thread.start()
    (token,) = claim(sqlite_database, [job], worker)
    first = log_of(sqlite_database, settings, job, 1)
    first.write_text("one\n")
    until(lambda: b"".join(seen) == b"one\n", "the first line")
    with first.open("a") as file:
        file.write("two\n")
    fail(sqlite_database, token, WorkerLost("it was killed"))
    until(lambda: any("ended: worker_lost: it was killed" in line for line in said), "the end of the first attempt")
    with sqlite_database.write() as session:
        session.execute(_AT_ONCE)
    (token,) = claim(sqlite_database, [job], worker)
    log_of(sqlite_database, settings, job, 2).write_text("three\n")
    succeed(sqlite_database, token)
    thread.join(30)
    assert not thread.is_alive()
    assert b"".join(seen) == b"one\ntwo\nthree\n"
    assert said[0] == "j1, attempt 1 on w1"
    assert said[-1] == "j1, attempt 2 ended: succeeded"
