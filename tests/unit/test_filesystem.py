"""File systems without some operations: optional ones are skipped and reported, required ones checked first."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.errors import StorageUnavailable
from qbatch.core.filesystem import (
    Refusal,
    add_default_permissions,
    disk_space,
    move,
    probe,
    require_locks,
    sync,
    touch,
    umask,
)
from qbatch.core.manifest import MANIFEST
from qbatch.core.settings import Settings
from qbatch.scheduler.local_stack import LocalStack
from qbatch.scheduler.stack_lock import stack_is_running
from qbatch.views.checks import State
from qbatch.views.doctor import examine
from qbatch.worker.checkpoints.published import find_published
from qbatch.worker.files.staging import require_space
from qbatch.worker.serving.usable_folders import check_environment
from tests.unit.test_checkpoint import KEY, PATH, look, put, staged

FSYNC, CHMOD, RENAME, FLOCK = os.fsync, os.chmod, os.rename, fcntl.flock


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"QBATCH_HOME": str(tmp_path / "home"), "QBATCH_STORAGE": str(tmp_path / "storage")})


def fails(number: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def no_folder_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CIFS and mounts of object stores have it."""

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        FSYNC(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def no_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chmod", fails(errno.EPERM))


@pytest.mark.usefixtures("no_folder_sync", "no_modes")
def test_a_checkpoint_omits_what_it_does_not_need_and_says_so(tmp_path: Path, source: Path) -> None:
    storage = tmp_path / "storage"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "chmod", CHMOD)
        folder = staged(storage)  # safetensors made a file of mode 0600
    put(folder, storage, source)
    assert find_published(storage, PATH, KEY) is not None
    manifest = json.loads((storage / PATH / MANIFEST).read_text())
    assert manifest["file_system_refused"] == ["chmod", "fsync of a folder"]


def test_a_whole_file_system_leaves_no_note_in_the_manifest(tmp_path: Path, source: Path) -> None:
    put(staged(tmp_path), tmp_path, source)
    assert json.loads((tmp_path / PATH / MANIFEST).read_text())["file_system_refused"] == []


def test_what_a_disk_fails_to_do_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)
    (tmp_path / "file").touch(0o600)
    monkeypatch.setattr(os, "chmod", fails(errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        add_default_permissions(tmp_path / "file")


@pytest.mark.usefixtures("no_folder_sync", "no_modes")
def test_the_probe_and_doctor_name_what_is_done_without(settings: Settings) -> None:
    check_environment(settings)
    assert probe(settings.staging) == {Refusal.MODE, Refusal.SYNC_FOLDER}
    found = {check.check: check for check in examine(settings, gpus=(), stack_runs=False)}
    assert found["file system"].state is State.NOTE
    assert found["file system"].message.startswith(
        "the file system of the storage refuses chmod: the mount decides who may read"
    )
    assert list(settings.staging.iterdir()) == list(settings.cache.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("call", "number", "said"),
    [
        ("pwrite", errno.EOPNOTSUPP, "cannot write to a file at any offset (Operation not supported)"),
        ("mmap", errno.ENODEV, "cannot map a file into memory (No such device)"),
        ("rename", errno.ENOSYS, "cannot rename a folder (Function not implemented)"),
    ],
)
def test_what_is_needed_is_refused_at_start_up_in_one_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, call: str, number: int, said: str
) -> None:
    monkeypatch.setattr(mmap if call == "mmap" else os, call, fails(number))
    with pytest.raises(StorageUnavailable) as caught:
        check_environment(settings)
    expected = f"{settings.staging}: its file system {said}, which publishing a checkpoint requires"
    assert str(caught.value) == expected
    found = {check.check: check for check in examine(settings, gpus=(), stack_runs=False)}
    assert (found["file system"].state, said in found["file system"].message) == (State.WRONG, True)


def test_a_rename_that_replaces_what_others_published_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(source: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        RENAME(source, target)

    monkeypatch.setattr(os, "rename", replace)
    with pytest.raises(StorageUnavailable, match="cannot refuse to replace a folder that is not empty"):
        check_environment(settings)


def test_a_full_disk_is_no_reason_to_refuse(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", fails(errno.ENOSPC))
    check_environment(settings)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_locks_that_are_needed_are_asked_for_at_start_up(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", fails(number))
    with pytest.raises(StorageUnavailable) as caught:
        check_environment(settings)
    assert str(caught.value) == (
        f"{settings.cache}: its file system does not support locks ({os.strerror(number)}), which the cache of "
        "sources needs: set QBATCH_CACHE to a folder on a local disk"
    )
    with pytest.raises(StorageUnavailable, match=r"which the stack needs: set QBATCH_HOME"):
        LocalStack(settings, worker_args=(), environ={}).__enter__()
    assert not stack_is_running(settings)
    found = [check for check in examine(settings, gpus=(), stack_runs=False) if check.check == "locks"]
    assert [check.state for check in found] == [State.WRONG, State.WRONG]


def test_a_cache_that_cannot_be_made_is_left_to_the_jobs_that_need_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_locks(tmp_path / "file" / "cache", "the cache of sources", "QBATCH_CACHE")


def _lost(source: str, target: str) -> None:
    """A server that renames, and whose reply is lost: its client asks again, and is told that nothing is there."""
    RENAME(source, target)
    RENAME(source, target)


def test_a_rename_whose_reply_is_lost_counts_as_done(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = staged(tmp_path)
    monkeypatch.setattr(os, "rename", _lost)
    published = put(folder, tmp_path, source)
    monkeypatch.undo()
    assert look(tmp_path) == published
    assert not folder.exists()


def test_a_rename_that_failed_is_not_taken_for_done(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").touch()
    (tmp_path / "source").mkdir()
    with pytest.raises(OSError, match="not empty"):
        move(tmp_path / "source", tmp_path / "target")
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "nothing", tmp_path / "nowhere")


def test_modes_are_added_to_and_never_taken_away(tmp_path: Path) -> None:
    before = umask()
    os.umask(0o027)
    try:
        assert umask() == 0o027
        (tmp_path / "private").touch(0o600)
        (tmp_path / "acl").touch()
        (tmp_path / "acl").chmod(0o664)  # as a default ACL may give it, whatever the umask
        assert add_default_permissions(tmp_path / "private") is add_default_permissions(tmp_path / "acl") is None
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("private", "acl")]
    assert modes == [0o640, 0o664]


def test_folders_keep_the_group_that_a_shared_storage_gives_them(tmp_path: Path, source: Path) -> None:
    tmp_path.chmod(0o2770)
    put(staged(tmp_path), tmp_path, source)
    assert (tmp_path / PATH).stat().st_mode & stat.S_ISGID


def test_another_users_file_need_not_be_ours_to_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reference.json").touch()
    monkeypatch.setattr(os, "utime", fails(errno.EPERM))
    touch(tmp_path / "reference.json")
    monkeypatch.setattr(os, "utime", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        touch(tmp_path / "reference.json")


def test_a_file_system_that_does_not_say_how_large_it_is_is_tried(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: there._replace(total=0, used=0, free=0))
    assert disk_space(tmp_path) is None
    require_space(tmp_path, 2**60)
    found = {check.check: check for check in examine(settings, gpus=(), stack_runs=False)}
    assert (found["storage"].state, "does not report free space" in found["storage"].message) == (State.OK, True)
    monkeypatch.setattr(shutil, "disk_usage", fails(errno.ENOSYS))
    assert disk_space(tmp_path) is None
