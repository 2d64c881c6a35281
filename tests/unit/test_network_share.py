"""SQLite on a network file system: told by the kernel's list of mounts; one host is warned, a second one refused."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from qbatch.cli import main
from qbatch.core import file_stat
from qbatch.core.errors import DatabaseOfAnotherHost
from qbatch.core.settings import Settings
from qbatch.models_db import network_share
from qbatch.models_db.network_share import NetworkShare, share_of
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.loop import Scheduler
from qbatch.views.doctor import examine

_MOUNT = "36 35 98:0 / {place} rw,noatime shared:1 master:2 - {type} server:/export rw\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the kernel says is on NFS, by name; it is not. Its name has a blank, as the kernel writes it."""
    home = tmp_path / "a home"
    home.mkdir()
    mounted(tmp_path, monkeypatch, ("/", "ext4"), (str(home).replace(" ", "\\040"), "nfs4"))
    monkeypatch.setenv("QBATCH_HOME", str(home))
    monkeypatch.delenv("QBATCH_DATABASE_URL", raising=False)
    return home


def mounted(folder: Path, monkeypatch: pytest.MonkeyPatch, *mounts: tuple[str, str]) -> None:
    table = folder / "mountinfo"
    table.write_text("".join(_MOUNT.format(place=place, type=type_) for place, type_ in mounts))
    monkeypatch.setattr(file_stat, "MOUNTS", table)


def on_host(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this is another kernel."""
    (folder / name).write_text(f"{name}\n")
    monkeypatch.setattr(network_share, "BOOT_ID", folder / name)


def share(home: Path) -> NetworkShare:
    found = share_of(home / "qbatch.db")
    assert found is not None
    return found


def test_the_deepest_and_latest_mount_tells_what_a_file_lies_on(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert share(home).file_system == "nfs4"
    assert share(home / "not" / "made" / "yet").file_system == "nfs4"
    assert share_of(tmp_path / "qbatch.db") is None
    assert share_of(None) is None
    (tmp_path / "link").symlink_to(home)
    assert share(tmp_path / "link").file == home / "qbatch.db", "links are followed"
    place = str(home).replace(" ", "\\040")
    mounted(tmp_path, monkeypatch, ("/", "nfs"), (place, "nfs4"), (place, "xfs"))
    assert share_of(home / "qbatch.db") is None
    assert share(tmp_path).file_system == "nfs"


def test_no_list_of_mounts_is_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_stat, "MOUNTS", tmp_path / "none")
    assert share_of(tmp_path / "qbatch.db") is None


def test_a_second_host_is_refused_until_the_first_was_silent_for_a_lease(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host("first", tmp_path, monkeypatch)
    for _ in range(2):
        share(home).hold(60.0)
    on_host("second", tmp_path, monkeypatch)
    for ask in (share(home).check, share(home).hold):
        with pytest.raises(DatabaseOfAnotherHost, match="QBATCH_DATABASE_URL=sqlite:///"):
            ask(60.0)
    (note,) = home.iterdir()
    os.utime(note, (time.time() - 61.0,) * 2)
    share(home).check(60.0)
    share(home).hold(60.0)
    on_host("first", tmp_path, monkeypatch)
    with pytest.raises(DatabaseOfAnotherHost):
        share(home).hold(60.0)
    assert list(home.iterdir()) == [note]


def test_commands_and_services_of_a_second_host_refuse(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host("first", tmp_path, monkeypatch)
    share(home).hold(60.0)
    on_host("second", tmp_path, monkeypatch)
    for command in (["status"], ["db", "upgrade"], ["up", "--cpu"], ["scheduler"]):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 3, (command, done.output)
        assert "is using it" in done.stderr.splitlines()[-1]
    assert not (home / "qbatch.db").exists()


def test_a_running_scheduler_says_that_its_host_works_there(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_env(os.environ)
    database = Database(settings.sqlalchemy_url)
    upgrade(database)
    on_host("first", tmp_path, monkeypatch)
    Scheduler(database, Broker(settings), settings).tick()
    on_host("second", tmp_path, monkeypatch)
    with pytest.raises(DatabaseOfAnotherHost):
        Scheduler(database, Broker(settings), settings).tick()
    database.dispose()


def test_one_host_is_warned_by_doctor(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_env(os.environ)
    found = {check.check: check for check in examine(settings, gpus=(), stack_runs=False)}
    assert found["database's disk"].state == "note"
    assert "nfs4" in found["database's disk"].message
    assert "QBATCH_DATABASE_URL=sqlite:////a/local/disk" in found["database's disk"].message
    on_host("first", tmp_path, monkeypatch)
    share(home).hold(60.0)
    on_host("second", tmp_path, monkeypatch)
    found = {check.check: check for check in examine(settings, gpus=(), stack_runs=False)}
    assert found["database"].state == "wrong"
    assert "is using it" in found["database"].message
