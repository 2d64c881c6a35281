"""A checkpoint is published completely or not at all, and only one that verifies is reused."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.digest import CHUNK_BYTES, FileDigest, digest_file
from qbatch.core.domain import DType, Method, Scheme
from qbatch.core.errors import DiskFull, SourceChanged, StorageError
from qbatch.core.manifest import MANIFEST
from qbatch.core.storage import MODEL_CARD
from qbatch.worker.checkpoints.publish import Origin, publish
from qbatch.worker.checkpoints.published import Published, Verified, checkpoint_path, find_published, problems, slug
from qbatch.worker.files.staging import remove_stale, require_space, stage, unstage

KEY = "ab" * 32
SCHEME = Scheme(method=Method.NF4)
PATH = checkpoint_path("org/Model-1", SCHEME, KEY)
WEIGHTS = b"the weights" * 1000
SIDECARS = (
    "tokenizer.json",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v3",
    "source.spm",
    "vocab.bpe",
    "bpe.codes",
    "qwen.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "README.md",
    "LICENSE",
    "LICENCE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
)
LEFT_BEHIND = (
    "pytorch_model.bin",
    "training_args.pt",
    "optimizer.pkl",
    "modeling_own.py",
    "tf_model.h5",
    "model.safetensors",
    "model.safetensors.index.json",
    "qbatch.json",
    ".gitattributes",
    "2_Dense/pytorch_model.bin",
    "2_Dense/own.py",
    "not_a_module/config.json",
    "additional_chat_templates/own.py",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name in (*SIDECARS, *LEFT_BEHIND, "config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the source's {name}")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../outside"}, {"path": None}]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def umask_027() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def staged(storage: Path, job_id: int = 1, attempt: int = 1, weights: bytes = WEIGHTS) -> Path:
    folder = stage(storage / ".staging", job_id, attempt)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "model.safetensors").chmod(0o600)
    (folder / "config.json").write_text("the writer's")
    return folder


def put(folder: Path, storage: Path, source: Path) -> Published:
    verified = publish_digests(folder, storage, source, [digest_file(folder / "model.safetensors")])
    return _without_states(verified.published)


def publish_digests(folder: Path, storage: Path, source: Path, files: list[FileDigest]) -> Verified:
    return publish(
        folder,
        storage=storage,
        source=source,
        key=KEY,
        origin=Origin(
            model="org/Model-1",
            revision="abc",
            fingerprint="f" * 64,
            scheme=SCHEME,
            dtype=DType.BFLOAT16,
            device_kind="cpu",
            device_name="a CPU",
            versions={"torch": "2"},
        ),
        files=files,
        audit={"skipped": ["lm_head"]},
        quantize_s=1.5,
        confirm=lambda: None,
    )


def look(storage: Path) -> Published | None:
    found = find_published(storage, PATH, KEY)
    return _without_states(found.published) if found is not None else None


def _without_states(published: Published) -> Published:
    """The states of its files depend on when they were read."""
    return replace(published, versions={})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_published_is_found_and_its_staging_is_gone(storage: Path, source: Path) -> None:
    folder = staged(storage)
    published = put(folder, storage, source)
    assert published == look(storage)
    assert (published.path, published.key, published.quantize_s) == (PATH, KEY, 1.5)
    assert published.audit == {"skipped": ["lm_head"]}
    assert not folder.exists()


def test_a_checkpoint_is_on_the_disk_before_it_is_in_its_place(
    storage: Path, source: Path, disk_order: list[str]
) -> None:
    folder = staged(storage)
    put(folder, storage, source)
    names = {path.name for path in (storage / PATH).rglob("*")} | {folder.name}
    moved = disk_order.index("rename")
    assert {"model.safetensors", "config.json", MANIFEST} < names
    assert set(disk_order[:moved]) == names
    assert (storage / PATH).parent.name in disk_order[moved:]


def test_the_size_is_that_of_all_weights(storage: Path, source: Path) -> None:
    published = put(staged(storage), storage, source)
    dense = (source / "2_Dense" / "model.safetensors").stat().st_size
    assert published.disk_bytes == len(WEIGHTS) + dense


def test_the_manifest_says_where_it_came_from_and_what_every_file_holds(storage: Path, source: Path) -> None:
    put(staged(storage), storage, source)
    folder = storage / PATH
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["source"] == {"model": "org/Model-1", "revision": "abc", "fingerprint": "f" * 64}
    assert Scheme.from_json(manifest["scheme"]) == SCHEME
    assert (manifest["dtype"], manifest["device"]) == ("bfloat16", {"kind": "cpu", "name": "a CPU"})
    assert manifest["chunk_bytes"] == CHUNK_BYTES
    assert {entry["name"]: entry["size"] for entry in manifest["files"]} == {
        name: len(data) for name, data in content(folder).items() if name not in (MANIFEST, MODEL_CARD)
    }


def test_a_user_gets_what_belongs_to_the_weights_and_nothing_that_runs(storage: Path, source: Path) -> None:
    put(staged(storage), storage, source)
    assert set(content(storage / PATH)) == {*SIDECARS, "config.json", "model.safetensors", MANIFEST}
    assert (storage / PATH / "config.json").read_text() == "the writer's", "the source's own is out of date"


@pytest.mark.parametrize("modules", ["not json", "{}", '["1_Pooling"]', "null", '[{"path": 3}]'])
def test_a_modules_json_of_another_make_names_no_folders(storage: Path, source: Path, modules: str) -> None:
    (source / "modules.json").write_text(modules)
    put(staged(storage), storage, source)
    assert not (storage / PATH / "1_Pooling").exists()


@pytest.mark.usefixtures("umask_027")
def test_files_get_the_umasks_mode(storage: Path, source: Path) -> None:
    put(staged(storage), storage, source)
    folder = storage / PATH
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}
    assert os.umask(0o027) == 0o027, "the process's own umask is as it was"


def test_a_second_writer_adopts_what_the_first_published(storage: Path, source: Path) -> None:
    first, second = staged(storage, 1), staged(storage, 2, weights=b"from another kernel")
    before = put(first, storage, source)
    assert put(second, storage, source) == before
    assert (storage / PATH / "model.safetensors").read_bytes() == WEIGHTS
    assert not any((storage / ".staging").iterdir())


def test_of_many_writers_at_once_all_end_with_the_same_checkpoint(storage: Path, source: Path) -> None:
    folders = [staged(storage, job_id) for job_id in range(1, 7)]
    published: list[Published] = []
    threads = [
        threading.Thread(target=lambda f=folder: published.append(put(f, storage, source))) for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(published) == len(folders)
    assert len({checkpoint.root_sha256 for checkpoint in published}) == 1
    assert [path.name for path in (storage / PATH).parent.iterdir()] == [Path(PATH).name]


def test_what_was_written_is_read_once_after_its_use(storage: Path, source: Path) -> None:
    folder = staged(storage)
    written = digest_file(folder / "model.safetensors")
    verified = publish_digests(folder, storage, source, [written])
    assert set(verified.published.versions.values()) == {""}, "nothing was read, so no state is known to be sound"
    assert set(verified.confirm().versions.values()).isdisjoint({""})


def test_other_bytes_than_were_written_are_noticed_after_their_use(storage: Path, source: Path) -> None:
    folder = staged(storage)
    written = digest_file(folder / "model.safetensors")
    _flip_a_byte(folder)
    verified = publish_digests(folder, storage, source, [written])
    with pytest.raises(SourceChanged, match=r"model\.safetensors changed while it was used"):
        verified.confirm()
    assert problems(storage / PATH) != []


def test_fewer_bytes_than_were_written_are_not_published_as_sound(storage: Path, source: Path) -> None:
    folder = staged(storage)
    written = digest_file(folder / "model.safetensors")
    _truncate(folder)
    with pytest.raises(StorageError, match=f"has 5 bytes, but {len(WEIGHTS)} were written"):
        publish_digests(folder, storage, source, [written])


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5)


def _flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _edit_manifest(folder: Path, **fields: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | fields))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flip_a_byte,
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        lambda folder: (folder / "1_Pooling" / "own.py").write_text(""),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
        lambda folder: _edit_manifest(folder, key="cd" * 32),
        lambda folder: _edit_manifest(folder, root_sha256="0" * 64),
        lambda folder: _edit_manifest(folder, files=None),
        lambda folder: _edit_manifest(folder, files=[{"name": "config.json"}]),
        lambda folder: _edit_manifest(folder, files=[{"name": 5, "size": 1, "chunk_sha256": []}]),
        lambda folder: _edit_manifest(folder, files=[{"name": "\0", "size": 1, "chunk_sha256": []}]),
        lambda folder: _edit_manifest(folder, files=[{"name": "../x", "size": 1, "chunk_sha256": []}]),
    ],
)
def test_a_damaged_checkpoint_is_moved_aside_and_written_anew(storage: Path, source: Path, damage: Any) -> None:
    put(staged(storage, 1), storage, source)
    damage(storage / PATH)
    left = content(storage / PATH)
    assert look(storage) is None
    assert not (storage / PATH).exists()
    (aside,) = (storage / PATH).parent.iterdir()
    assert content(aside) == left, "it is kept for whoever wants to know what happened"
    assert put(staged(storage, 2), storage, source) == look(storage)


def test_a_checkpoint_that_cannot_be_read_now_is_left_where_it_is(storage: Path, source: Path) -> None:
    put(staged(storage), storage, source)
    weights = storage / PATH / "model.safetensors"
    weights.unlink()
    weights.symlink_to(weights)  # opening it is an error other than "not there", even for root
    with pytest.raises(StorageError, match="cannot verify"):
        look(storage)
    assert (storage / PATH).is_dir()
    assert len(problems(storage / PATH)) == 1


def test_a_model_card_written_later_is_no_damage(storage: Path, source: Path) -> None:
    put(staged(storage), storage, source)
    for name in ("README.md", "CHANGES.md", ".nfs0001", ".DS_Store"):
        (storage / PATH / name).write_text("measured")
    assert problems(storage / PATH) == []
    assert look(storage) is not None


def test_nothing_published_is_nothing_found(storage: Path) -> None:
    assert look(storage) is None
    assert problems(storage / PATH)


def test_staging_removes_what_earlier_attempts_left_and_no_more(storage: Path) -> None:
    staging = storage / ".staging"
    for name in ("5-1", "5-2", "5-4", "15-1", "55-1"):
        (staging / name / "deep").mkdir(parents=True)
    assert stage(staging, 5, 3) == staging / "5-3"
    assert sorted(path.name for path in staging.iterdir()) == ["15-1", "5-3", "5-4", "55-1"]
    unstage(staging / "5-3")
    unstage(staging / "5-3")
    assert not (staging / "5-3").exists()


def test_staging_where_nothing_can_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="staging"):
        stage(tmp_path / "file", 1, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/Model-1", "Model-1"),
        ("/models/a b/", "a-b"),
        ("../..", "model"),
        ("~", "model"),
        ("模型", "model"),
        (".hidden", "hidden"),
        ("m" * 200, "m" * 80),
    ],
)
def test_a_slug_is_one_plain_path_component(name: str, expected: str) -> None:
    assert slug(name) == expected


def test_what_no_running_attempt_owns_is_removed(tmp_path: Path) -> None:
    for job_id, attempt in ((1, 1), (2, 3)):
        (stage(tmp_path / "w1", job_id, attempt) / "model.safetensors").write_bytes(b"half")
    (tmp_path / "w1" / "someone-elses").mkdir()
    asked: list[tuple[int, int]] = []

    def running(tokens: Iterable[tuple[int, int]]) -> list[int]:
        asked.extend(tokens)
        return [2]

    assert remove_stale([tmp_path / "w1", tmp_path / "no such folder"], running) == ["1-1"]
    assert sorted(asked) == [(1, 1), (2, 3)]
    assert sorted(path.name for path in (tmp_path / "w1").iterdir()) == ["2-3", "someone-elses"]


def test_room_that_may_come_is_told_from_room_that_never_will(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    free, used = found.f_bavail * found.f_frsize, (found.f_blocks - found.f_bfree) * found.f_frsize
    require_space(tmp_path, free // 2)
    with pytest.raises(DiskFull, match=r"the storage has [0-9.]+ MiB left") as caught:
        require_space(tmp_path, free + used // 2)
    assert caught.value.needed_bytes == free + used // 2
    with pytest.raises(StorageError, match=r"more than the whole storage, which has [0-9.]+ MiB"):
        require_space(tmp_path, free + 2 * used)
