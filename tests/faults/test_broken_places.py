"""A home, disk or database that cannot be used: every command says so in one line, with its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from qbatch.core.settings import Settings
from qbatch.models_db.session import Database
from tests.every_command import CommandOutcome, run_every_command
from tests.faults.test_disk import private_mounts
from tests.rows import a_batch
from tests.stored_checkpoints import a_measured_batch
from tests.unprivileged import without_rights

# Flower needs nothing but Redis, and waits for that.
_NOT_ASKED = ("flower",)
# What starts or is a service waits for a database that may come back, and who watches for jobs that may end.
_SERVICES = ("up", "worker", "scheduler", "run", "watch")
# Of no place: it reads a model, and there is none.
_OF_NO_PLACE = "inspect"


def refused(found: dict[str, CommandOutcome]) -> dict[str, str]:
    """The line with which each command ended with exit code 3; all but doctor must have ended so."""
    assert len(found) > 20
    assert {name: outcome.let_through for name, outcome in found.items() if outcome.let_through} == {}
    assert found.pop("doctor").code == 1
    assert found.pop(_OF_NO_PLACE).code == 2
    if (launcher := found.pop("worker", None)) is not None:
        # Which device's worker says it is another process.
        assert launcher.code == 3
    assert {name: outcome for name, outcome in found.items() if (outcome.code, len(outcome.lines)) != (3, 1)} == {}
    return {name: outcome.lines[0] for name, outcome in found.items()}


def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("neither a folder nor a database")
    places = [
        {"QBATCH_HOME": str(tmp_path / "text")},
        {"QBATCH_HOME": str(tmp_path / "text" / "below")},
        {"QBATCH_HOME": "/proc/no/home"},
        {"QBATCH_HOME": str(tmp_path / "home"), "QBATCH_DATABASE_URL": f"sqlite:///{tmp_path / 'text'}"},
    ]
    of_homes = [refused(found) for found in run_every_command(*places, but=_NOT_ASKED)]
    for found, place in zip(
        of_homes, (tmp_path / "text", tmp_path / "text", "/proc/no", tmp_path / "text"), strict=True
    ):
        assert {name: line for name, line in found.items() if str(place) not in line} == {}
    for command in ("status", "submit", "up"):
        assert of_homes[0][command].endswith("it is a file, not a folder")
    assert "file is not a database" in of_homes[3]["status"]
    assert (tmp_path / "text").read_text() == "neither a folder nor a database"


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    (found,) = run_every_command({"QBATCH_HOME": str(home)}, but=_NOT_ASKED, preexec=without_rights())
    said = refused(found)
    assert "Permission denied" in said["results"]
    assert {name: line for name, line in said.items() if str(home) not in line} == {}


def test_what_is_there_but_cannot_be_written_is_said(tmp_path: Path, sqlite_database: Database) -> None:
    """With a database and rows in it. What only reads may answer."""
    a_batch(sqlite_database)
    sqlite_database.dispose()
    tmp_path.chmod(0o500)
    place = {"QBATCH_HOME": str(tmp_path)}
    (found,) = run_every_command(place, but=(*_NOT_ASKED, *_SERVICES), preexec=without_rights())
    tmp_path.chmod(0o700)
    assert_said(found)


def test_a_database_of_another_user_says_which_right_is_missing(tmp_path: Path, sqlite_database: Database) -> None:
    a_batch(sqlite_database)
    sqlite_database.dispose()
    for path in (tmp_path / "qbatch.db", tmp_path):
        path.chmod(path.stat().st_mode & 0o555)
    done = subprocess.run(
        [sys.executable, "-m", "qbatch", "results"],
        env={**os.environ, "QBATCH_HOME": str(tmp_path)},
        preexec_fn=without_rights(),
        capture_output=True,
        text=True,
        check=False,
    )
    tmp_path.chmod(0o700)
    assert done.returncode == 3
    assert "may not be written by this user, which SQLite needs to read it too" in done.stderr


@pytest.mark.parametrize("closed", ["", "storage", "storage/checkpoints"], ids=["above it", "itself", "within it"])
def test_a_storage_that_may_not_be_looked_at_is_said(tmp_path: Path, sqlite_database: Database, closed: str) -> None:
    """As where it belongs to another user, or its mount has lost its rights."""
    place = {"QBATCH_HOME": str(tmp_path), "QBATCH_STORAGE": str(tmp_path / "mount" / "storage")}
    a_measured_batch(sqlite_database, Settings.from_env(place), "org/a")
    sqlite_database.dispose()
    refusing = tmp_path / "mount" / closed
    refusing.chmod(0)
    (found,) = run_every_command(place, but=(*_NOT_ASKED, *_SERVICES), preexec=without_rights())
    refusing.chmod(0o700)
    assert {name: outcome.let_through for name, outcome in found.items() if outcome.let_through} == {}
    assert {name: outcome for name, outcome in found.items() if outcome.code not in (0, 1, 2, 3)} == {}
    assert found["doctor"].code == 1
    assert found["gc"].code == 3
    assert "Permission denied" in found["gc"].lines[0]


def test_a_full_disk_is_said(tmp_path: Path, sqlite_database: Database) -> None:
    a_batch(sqlite_database)
    sqlite_database.dispose()
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        'mount -t tmpfs -o size=3m tmpfs "$1" && cp "$2" "$1/qbatch.db" && mkdir "$1/storage" '
        '&& { yes | head -c 3m > "$1/rest"; true; } && shift 2 && exec "$@"'
    )
    before = [*private_mounts(), "sh", "-c", script, "sh", str(disk), str(tmp_path / "qbatch.db")]
    (found,) = run_every_command({"QBATCH_HOME": str(disk)}, but=(*_NOT_ASKED, *_SERVICES), before=before)
    assert_said(found)
    assert "full" in found["submit"].lines[0]


def assert_said(found: dict[str, CommandOutcome]) -> None:
    assert {name: outcome.let_through for name, outcome in found.items() if outcome.let_through} == {}
    said = {name: (outcome.code, len(outcome.lines)) for name, outcome in found.items()}
    assert {name: found[name] for name, (code, lines) in said.items() if code == 3 and lines != 1} == {}
    assert {name: outcome for name, outcome in found.items() if outcome.code not in (0, 1, 2, 3, 4)} == {}
    assert found["submit"].code == 3


@pytest.fixture
def other_password(postgresql_url: str) -> Iterator[str]:
    """A URL whose password the server refuses."""
    database = Database(postgresql_url)
    with database.engine.begin() as connection:
        connection.execute(text("CREATE ROLE guest LOGIN PASSWORD 'right'"))
        rules = Path(connection.execute(text("SHOW hba_file")).scalar_one())
        before = rules.read_text()
        rules.write_text(f"local all guest scram-sha-256\nhost all guest all scram-sha-256\n{before}")
        connection.execute(text("SELECT pg_reload_conf()"))
    yield make_url(postgresql_url).set(username="guest", password="wrong").render_as_string(hide_password=False)  # noqa: S106
    rules.write_text(before)
    with database.engine.begin() as connection:
        connection.execute(text("SELECT pg_reload_conf()"))
        connection.execute(text("DROP ROLE guest"))
    database.dispose()


def test_a_database_that_refuses_the_password_is_one_line(tmp_path: Path, other_password: str) -> None:
    place = {"QBATCH_HOME": str(tmp_path), "QBATCH_DATABASE_URL": other_password}
    (found,) = run_every_command(place, but=(*_NOT_ASKED, *_SERVICES))
    said = refused(found)
    assert "password authentication failed" in said["status"]
    assert not any("wrong" in line.replace("wrong password", "") for line in said.values())
