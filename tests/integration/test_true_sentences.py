"""What commands say besides their data holds for the case at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from qbatch.cli import main
from qbatch.core.domain import DeviceKind
from qbatch.models_db import leases
from qbatch.models_db.checkpoints import record
from qbatch.models_db.session import Database
from tests.rows import a_batch, a_worker, bundle, claim


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path))
    monkeypatch.delenv("QBATCH_STORAGE", raising=False)
    return tmp_path


def test_only_a_checkpoint_of_this_database_can_be_replaced(sqlite_database: Database, home: Path) -> None:
    published, copy = home / "storage" / "checkpoints" / "model" / "bnb-nf4-0", home / "copy"
    with sqlite_database.write() as session:
        record(
            session, key="k", path=str(published.relative_to(home / "storage")), root_sha256="", disk_bytes=1, job_id=1
        )
    others = (copy, published.with_name("bnb-nf4-1"), published.with_name("bnb-nf4-0.rejected-1"))
    for folder in (published, *others):
        folder.mkdir(parents=True)
        done = CliRunner().invoke(main, ["verify", str(folder)])
        assert (done.exit_code, "there is no valid qbatch.json" in done.stderr) == (1, True)
        assert ("--force" in done.stderr) == (folder == published)


def test_a_worker_with_jobs_is_busy_for_people_and_ready_for_programs(sqlite_database: Database, home: Path) -> None:
    _, ids = a_batch(sqlite_database)
    busy = a_worker(sqlite_database, "w1")
    a_worker(sqlite_database, "w2")
    claim(sqlite_database, ids, busy)
    table = CliRunner().invoke(main, ["workers"]).stdout.splitlines()
    assert [("busy" in line, "ready" in line) for line in table if line.startswith("w")][-2:] == [
        (True, False),
        (False, True),
    ]
    assert CliRunner().invoke(main, ["workers", "--json"]).stdout.count('"state": "ready"') == 2


@pytest.mark.parametrize("command", [["status"], ["status", "b1"], ["jobs"], ["jobs", "b1", "b2"]])
def test_a_queue_that_nothing_works_on_is_named_with_what_would(
    sqlite_database: Database, home: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    assert "qbatch up" not in CliRunner().invoke(main, ["jobs"]).stderr, "nothing is queued"
    for _ in range(2):
        a_batch(sqlite_database)
    named = "b1" if command == ["status", "b1"] else "b1, b2"
    said = CliRunner().invoke(main, command).stderr
    assert f"no stack is running here, so nothing works on {named}: `qbatch up` starts one" in said
    assert CliRunner().invoke(main, [*command, "--json"]).stderr == ""
    monkeypatch.setenv("QBATCH_BROKER_URL", "redis://elsewhere:6379/0")
    monkeypatch.setenv("QBATCH_STORAGE", str(home))
    said = CliRunner().invoke(main, command).stderr
    assert f"no worker is live, so nothing works on {named}: `qbatch worker` starts" in said
    a_worker(sqlite_database)
    assert "no scheduler is active" in CliRunner().invoke(main, command).stderr
    with sqlite_database.write() as session:
        leases.acquire(session, leases.LEAD, "here", 60.0)
    assert CliRunner().invoke(main, command).stderr == ""
    for _ in range(2):
        a_batch(sqlite_database, bundle(device=DeviceKind.CUDA))
    said = CliRunner().invoke(main, [*command[:1], "b2", "b3", "b4"]).stderr
    assert said.startswith("b3, b4 need a GPU, and no live worker has one: `qbatch worker` starts")


def test_where_nothing_is_to_be_removed_one_sentence_says_so(sqlite_database: Database, home: Path) -> None:
    (home / "storage").mkdir()
    for command in (["gc"], ["gc", "--yes"], ["keep", "--recommended"]):
        done = CliRunner().invoke(main, command)
        assert (done.exit_code, done.output) == (0, "nothing to remove\n")
    assert '"number": 0' in CliRunner().invoke(main, ["gc", "--json"]).stdout
    log = home / "storage" / "logs" / "j9-1.log"
    log.parent.mkdir()
    log.write_text("of 0.1.0")
    os.utime(log, (0, 0))
    lines = CliRunner().invoke(main, ["gc"]).stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["logs"], "a kind of which there is none is not listed"


def test_nothing_is_said_of_earlier_results_that_nobody_has_looked_for(home: Path) -> None:
    """Which files a model of the hub has only a worker finds out; it may then answer all of them."""
    (home / "list").write_text("org/model\n")
    done = CliRunner().invoke(main, ["submit", "--models", str(home / "list"), "--bits", "4"])
    assert done.stdout == "b1: 2 jobs\n"


@pytest.mark.parametrize("command", [["run"], ["submit"], ["submit", "--wait"]])
def test_ctrl_c_before_the_watching_begins_says_what_was_stored(
    home: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """While the batch is sent, which may wait for Redis."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qbatch.commands.submission.send", interrupt)
    monkeypatch.setenv("QBATCH_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("QBATCH_DATABASE_URL", f"sqlite:///{home / 'qbatch.db'}")
    done = CliRunner().invoke(main, [*command, "org/model", "--bits", "4"])
    assert done.exit_code == 130
    assert "no longer watching; b1 goes on (2 queued): `qbatch watch b1` shows it again" in done.stderr
