"""A command whose reader has gone, and a watch of what has ended, as a shell starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qbatch.cli import main
from qbatch.commands.wait_and_watch import what_goes_on
from qbatch.core.settings import Settings
from qbatch.models_db import jobs
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from tests.rows import a_batch


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With one batch, which was cancelled, and one that waits for a worker."""
    for name in [name for name in os.environ if name.startswith("QBATCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path))
    database = Database(Settings.from_env(os.environ).sqlalchemy_url)
    upgrade(database)
    batch, _ = a_batch(database)
    with database.write() as session:
        jobs.cancel(session, batch_ids=[batch])
    a_batch(database)
    database.dispose()
    return tmp_path


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("command", [["jobs"], ["watch", "b2"], ["watch"]])
def test_a_command_whose_reader_has_gone_ends_quietly(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "qbatch", *command], stdout=nobody, stderr=subprocess.PIPE, check=False, timeout=60
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.usefixtures("home")
def test_a_batch_that_has_ended_is_not_watched_for_long() -> None:
    done = CliRunner().invoke(main, ["watch", "b1"])
    assert (done.exit_code, done.stderr) == (1, "")
    assert done.stdout.startswith("b1: 0 of 3 jobs succeeded, 3 cancelled, after ")


def test_who_leaves_is_told_what_is_left(home: Path) -> None:
    settings = Settings.from_env(os.environ)
    database = Database(settings.sqlalchemy_url)
    assert what_goes_on(database, settings, [2]) == (
        "no longer watching; b2 stays queued (3 queued): no stack is running, and `qbatch up` starts one; "
        "`qbatch watch b2` shows it again, `qbatch cancel b2` cancels it"
    )
    elsewhere = Settings.from_env({"QBATCH_HOME": str(home), "QBATCH_BROKER_URL": "redis://:p@redis.example:6379/0"})
    assert what_goes_on(database, elsewhere, [1, 2]) == (
        "no longer watching; b1, b2 go on (3 queued): `qbatch watch b1 b2` shows them again, "
        "`qbatch cancel b1 b2` cancels them"
    )
    assert what_goes_on(database, elsewhere, []) == (
        "no longer watching; all that is open goes on: `qbatch watch` shows it again"
    )
    database.dispose()


def test_where_nothing_is_open_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path))
    done = CliRunner().invoke(main, ["watch"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "nothing is queued or running\n")
