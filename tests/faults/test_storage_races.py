"""Several workers use one place of the storage at once: fresh files stay, stale ones go, and nothing fails."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qbatch.core.manifest import MANIFEST
from qbatch.worker.checkpoints.published import Published, problems
from qbatch.worker.files.staging import unstage
from tests.unit.test_checkpoint import PATH, look, put, staged

_WRITERS = 6


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


def test_a_fresh_checkpoint_stays_though_another_saw_the_damaged_one(storage: Path, source: Path) -> None:
    put(staged(storage, 1), storage, source)
    manifest = storage / PATH / MANIFEST
    manifest.unlink()
    os.mkfifo(manifest)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(look, storage)
        with manifest.open("w"):  # opens once the other has begun to read, and holds it there
            (storage / PATH).rename((storage / PATH).with_name("what another verifier moved aside"))
            fresh = put(staged(storage, 2), storage, source)
            inode = (storage / PATH).stat().st_ino
        assert slow.result() == fresh
    assert (storage / PATH).stat().st_ino == inode
    assert problems(storage / PATH) == []


def test_many_who_find_it_damaged_at_once_end_with_one_fresh_checkpoint(storage: Path, source: Path) -> None:
    for round_ in range(10):
        damaged = put(staged(storage, 1000 + round_), storage, source)
        os.truncate(storage / PATH / "model.safetensors", 5)
        start = threading.Barrier(_WRITERS)

        def verify_or_write(job_id: int, start: threading.Barrier = start) -> Published:
            start.wait()
            return look(storage) or put(staged(storage, job_id), storage, source)

        with ThreadPoolExecutor(_WRITERS) as pool:
            found = list(pool.map(verify_or_write, range(1, _WRITERS + 1)))
        assert {one.root_sha256 for one in found} == {damaged.root_sha256}
        assert problems(storage / PATH) == []
        aside = [folder for folder in (storage / PATH).parent.iterdir() if ".rejected-" in folder.name]
        assert len(aside) == round_ + 1, "nothing but what was damaged is ever moved aside"


def test_many_who_remove_one_staging_folder_at_once_leave_nothing(storage: Path) -> None:
    for round_ in range(10):
        folder = staged(storage, round_)
        for number in range(300):
            (folder / f"{number}").touch()
        start = threading.Barrier(_WRITERS)

        def remove(_: int, start: threading.Barrier = start, folder: Path = folder) -> None:
            start.wait()
            unstage(folder)

        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(remove, range(_WRITERS)))
        assert not folder.exists()
