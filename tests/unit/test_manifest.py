"""Publishing, verification and answering read a checkpoint's manifest in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.digest import CHUNK_BYTES, FileDigest, digest_file, root_sha256
from qbatch.core.file_stat import Mounts, stat_file
from qbatch.core.manifest import MANIFEST, Manifest
from qbatch.core.storage import CheckpointState, checkpoint_state
from qbatch.worker.checkpoints.published import find_published, problems

KEY = "ab" * 32
PATH = f"checkpoints/m/bnb-nf4-{KEY[:16]}"


def published(storage: Path) -> Path:
    folder = storage / PATH
    folder.mkdir(parents=True)
    digests = []
    for name, data in (("model.safetensors", b"weights"), ("config.json", b"{}")):
        (folder / name).write_bytes(data)
        digests.append(digest_file(folder / name))
    files = [{"name": d.name, "size": d.size, "chunk_sha256": list(d.chunk_sha256)} for d in digests]
    edit(folder, key=KEY, root_sha256=root_sha256(digests), files=files, audit={"a": 1}, quantize_s=None)
    return folder


def edit(folder: Path, **fields: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def versions(folder: Path) -> dict[str, str]:
    mounts = Mounts()
    return {name: stat_file(folder / name, mounts).version for name in ("model.safetensors", "config.json")}


def test_all_three_take_what_was_published(tmp_path: Path) -> None:
    folder = published(tmp_path)
    assert problems(folder) == []
    assert checkpoint_state(tmp_path, PATH, versions(folder)) is CheckpointState.SOUND
    found = find_published(tmp_path, PATH, KEY)
    assert found is not None
    assert (found.published.disk_bytes, found.published.audit) == (len(b"weights"), {"a": 1})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "there is no valid qbatch.json"),
        (
            lambda folder: edit(folder, files=[{"name": "../x", "size": 1, "chunk_sha256": []}]),
            "there is no valid qbatch.json",
        ),
        (lambda folder: edit(folder, audit=None), "there is no valid qbatch.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            "config.json has changed since it was published (still 2 bytes, but the content differs: bytes 0 to 1 "
            "have the SHA-256 4f53cda18c2baa0c…, and 44136fa355b3678a… was published)",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json is not in the"),
        (lambda folder: edit(folder, root_sha256="0" * 64), "the root checksum"),
    ],
    ids=["no manifest", "leads out", "lacks a field", "a file less", "other bytes", "a file more", "another root"],
)
def test_none_of_them_takes_what_was_not(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    folder = published(tmp_path)
    before = versions(folder)
    damage(folder)
    (line,) = problems(folder)
    assert line.startswith(said)
    if "root" not in said:  # which only reading the files would tell
        assert checkpoint_state(tmp_path, PATH, before) is not CheckpointState.SOUND
    assert find_published(tmp_path, PATH, KEY) is None


def test_everything_that_differs_is_named() -> None:
    files = tuple(FileDigest(name=name, size=1, chunk_sha256=("0" * 64,)) for name in "abc")
    manifest = Manifest(key=KEY, root_sha256=root_sha256(files), files=files, audit={}, quantize_s=1.0)
    same = {file.name: file for file in files}
    assert manifest.differences(same) == []
    changed = FileDigest(name="b", size=2, chunk_sha256=("1" * 64,))
    assert manifest.differences({"x": None, "a": same["a"], "b": changed}) == [
        "x is not in the manifest",
        "b has changed since it was published (now 2 bytes, then 1)",
        "c is missing",
    ]


def test_of_a_large_file_the_first_changed_part_is_named() -> None:
    size = 2 * CHUNK_BYTES + 5
    file = FileDigest(name="a", size=size, chunk_sha256=("0" * 64, "1" * 64, "2" * 64))
    manifest = Manifest(key=KEY, root_sha256=root_sha256([file]), files=(file,), audit={}, quantize_s=1.0)
    for chunk, place in ((1, f"{CHUNK_BYTES} to {2 * CHUNK_BYTES - 1}"), (2, f"{2 * CHUNK_BYTES} to {size - 1}")):
        chunks = tuple("f" * 64 if index == chunk else old for index, old in enumerate(file.chunk_sha256))
        (line,) = manifest.differences({"a": FileDigest(name="a", size=size, chunk_sha256=chunks)})
        said = f"(still {size} bytes, but 1 of 3 parts differs: bytes {place} have the SHA-256 {'f' * 16}…, and "
        assert line.endswith(f"{said}{str(chunk) * 16}… was published)")
