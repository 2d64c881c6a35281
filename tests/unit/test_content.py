"""A model is identified by its content: what is hashed before it is used is confirmed afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from qbatch.core.digest import CHUNK_BYTES, Checksums, checksums
from qbatch.core.errors import SourceChanged, SourceNotFound
from qbatch.core.file_stat import FINE_TICK_NS, TICK_NS, FileStat, Mount, Mounts, clock_ns, stat_file
from qbatch.core.model_files import content_files
from qbatch.worker.files.content import Content, NoDigestCache, hash_content, hash_files
from tests.source_identity import fingerprint


class Remembered:
    """A cache that lasts as long as its test."""

    def __init__(self) -> None:
        self.digests: dict[FileStat, Checksums] = {}
        self.asked: list[FileStat] = []

    def known(self, stats: Iterable[FileStat]) -> Mapping[FileStat, Checksums]:
        self.asked = list(stats)
        return {stat: self.digests[stat] for stat in self.asked if stat in self.digests}

    def remember(self, digests: Mapping[FileStat, Checksums]) -> None:
        self.digests |= digests


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The names and bytes of a model, long settled."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the files that are there have been there for an hour."""
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 3600 * 10**9)


def hashed(folder: Path) -> Content:
    return hash_content(lambda: content_files(folder), NoDigestCache())


def test_content_alone_tells_models_of_one_shape_apart(model: Path) -> None:
    before = fingerprint(model)
    assert fingerprint(model.rename(model.with_name("moved"))) == before
    weights = model.with_name("moved") / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_size == stat.st_size
    assert fingerprint(weights.parent) != before


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
        "additional_chat_templates/tool.jinja",
    ],
)
def test_whatever_is_computed_with_or_published_is_part_of_it(name: str, model: Path) -> None:
    before = fingerprint(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{}")
    added = fingerprint(model)
    (model / name).write_text("{ }")
    assert len({before, added, fingerprint(model)}) == 3


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_not_part_of_it(name: str, model: Path) -> None:
    before = fingerprint(model)
    (model / name).write_text("{}")
    assert fingerprint(model) == before


def test_the_files_of_a_sentence_transformers_module_are_part_of_it(model: Path) -> None:
    (model / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    before = fingerprint(model)
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert fingerprint(model) != before


def test_other_files_are_not_part_of_a_model(model: Path) -> None:
    before = fingerprint(model)
    for name in ("README.md", "modeling.py", "model.safetensors.index.json", "pytorch_model.bin", "qbatch.json"):
        (model / name).write_text("{}")
    assert fingerprint(model) == before


def test_a_folder_without_a_config_is_no_model(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(SourceNotFound):
        content_files(model, allow_pickle=True)


def overwrite(path: Path) -> None:
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(b"WEIGHTS")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_file(path: Path) -> None:
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"WEIGHTS")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(path)


def write_the_same(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def retarget(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def add_template(path: Path) -> None:
    path.with_name("chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("is_settled", [True, False], ids=["settled", "young"])
@pytest.mark.parametrize("change", [overwrite, replace_file, write_the_same, Path.unlink, retarget, add_template])
def test_whatever_changes_while_it_is_used_is_noticed(
    change: Callable[[Path], object], is_settled: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_settled:
        settle(monkeypatch)
    content = hashed(model)
    change(model / "model.safetensors")
    with pytest.raises((SourceChanged, SourceNotFound)):
        content.confirm()


def test_a_link_made_to_a_file_is_no_change_of_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    content = hashed(model)
    os.link(model / "model.safetensors", model / "backup")
    content.confirm()
    content.confirm()


def test_a_young_file_is_read_again_and_then_trusted(model: Path) -> None:
    cache = Remembered()
    content = hash_content(lambda: content_files(model), cache)
    assert set(content.versions.values()) == {""}
    assert not cache.digests, "a change in the same tick of the clock would not show"
    content.confirm()
    assert all(content.versions.values())
    assert {Path(stat.path).name for stat in cache.digests} == {"config.json", "model.safetensors"}


def test_only_what_is_not_known_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    cache = Remembered()
    first = hash_content(lambda: content_files(model), cache)
    read: list[int] = []
    again = hash_content(lambda: content_files(model), cache, on_progress=lambda done, _: read.append(done))
    assert (read, again.root_sha256) == ([], first.root_sha256)
    (model / "config.json").write_text('{"x": 1}')
    changed = hash_content(lambda: content_files(model), cache, on_progress=lambda done, _: read.append(done))
    assert read == [len('{"x": 1}')]
    assert changed.root_sha256 != first.root_sha256


def test_the_hash_of_the_whole_file_is_made_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(CHUNK_BYTES + 1)
    cache = Remembered()
    (plain,) = hash_files({"large": path}, cache)
    assert plain.checksums.sha256 is None
    (whole,) = hash_files({"large": path}, cache, whole=lambda _: True)
    assert whole.checksums.chunk_sha256 == plain.checksums.chunk_sha256
    # sha256sum of 64 MiB and one byte of zeros
    assert whole.checksums.sha256 == "91990977345985aaf03af1358f4f989d7eaf985b58529efb72f613c588f6599a"
    (known,) = hash_files(
        {"large": path}, cache, whole=lambda _: True, on_progress=lambda *_: pytest.fail("read again")
    )
    assert known.checksums == whole.checksums


def test_a_file_written_while_it_is_hashed_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written_meanwhile(files: object, **options: object) -> list[Checksums]:
        found = checksums(files, **options)  # type: ignore[arg-type]
        write_the_same(model / "model.safetensors")
        return found

    monkeypatch.setattr("qbatch.worker.files.content.checksums", written_meanwhile)
    with pytest.raises(SourceChanged, match="while it was read"):
        hashed(model)


def test_a_file_linked_while_it_is_hashed_is_read_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)

    def linked_meanwhile(files: object, **options: object) -> list[Checksums]:
        found = checksums(files, **options)  # type: ignore[arg-type]
        os.link(model / "model.safetensors", model / "backup")
        return found

    with monkeypatch.context() as patched:
        patched.setattr("qbatch.worker.files.content.checksums", linked_meanwhile)
        content = hashed(model)
    assert content.versions["model.safetensors"] == ""
    content.confirm()
    assert content.versions["model.safetensors"]


def test_more_files_than_a_process_may_open_are_hashed_in_groups(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (model / f"{number}.json").write_text(str(number))
    at_once = fingerprint(model)
    monkeypatch.setattr("qbatch.worker.files.content._OPEN_AT_ONCE", 2)
    assert fingerprint(model) == at_once


def test_an_invalid_modules_file_is_treated_as_any_file(model: Path) -> None:
    (model / "modules.json").write_text("[" * 100_000)
    assert "modules.json" in content_files(model)


@pytest.mark.parametrize(("ticks", "is_settled"), [(0.5, False), (2.0, True), (-1.0, False)])
def test_a_file_is_settled_once_the_clock_has_moved_on(ticks: float, is_settled: bool, model: Path) -> None:
    stat = stat_file(model / "config.json", Mounts())
    assert stat.is_settled(stat.ctime_ns + int(ticks * stat.tick_ns)) is is_settled


@pytest.mark.parametrize(
    ("file_system", "ctime_ns", "tick_ns"),
    [
        ("ext4", 1_700_000_000_123_456_789, FINE_TICK_NS),
        ("ext4", 1_700_000_000_000_000_000, TICK_NS),  # with small inodes
        ("ext4", 1_700_000_000_120_000_000, TICK_NS),
        ("vfat", 1_700_000_000_123_456_789, TICK_NS),
        ("nfs4", 1_700_000_000_123_456_789, TICK_NS),
        (None, 1_700_000_000_123_456_789, TICK_NS),
    ],
)
def test_times_are_trusted_as_far_as_they_are_stored(file_system: str | None, ctime_ns: int, tick_ns: int) -> None:
    mount = None if file_system is None else Mount(point="/", file_system=file_system, label="", is_remote=False)
    stat = FileStat(path="/a", device=1, inode=1, size=1, mtime_ns=0, ctime_ns=ctime_ns, mount=mount)
    assert stat.tick_ns == tick_ns


def test_a_young_file_keeps_nobody_waiting_for_longer_than_a_tick(model: Path) -> None:
    stat = stat_file(model / "config.json", Mounts())
    if stat.tick_ns == FINE_TICK_NS:
        content = hashed(model)
        before_s = time.monotonic()
        content.confirm()
        assert time.monotonic() - before_s < TICK_NS / 1e9 / 2


def test_a_changed_mtime_does_not_hide_a_change(model: Path) -> None:
    path = model / "model.safetensors"
    before = stat_file(path, Mounts())
    overwrite(path)
    after = stat_file(path, Mounts())
    assert (after.mtime_ns, after.size, after.inode) == (before.mtime_ns, before.size, before.inode)
    assert after.version != before.version


def test_a_file_is_named_by_where_it_lies_and_its_mount_by_what_it_is(model: Path) -> None:
    (model / "link").symlink_to("model.safetensors")
    stat = stat_file(model / "link", Mounts())
    assert stat.path == str(model / "model.safetensors")
    assert stat.mount is not None
    assert stat.path.startswith(stat.mount.point)
    assert clock_ns([stat]) <= time.time_ns()


def test_mounts_at_odd_places_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = tmp_path / "mountinfo"
    listing.write_text(
        "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "21 20 0:40 /export /mnt/two\\040words rw shared:1 - nfs4 server:/export rw,vers=4.2\n"
    )
    monkeypatch.setattr("qbatch.core.file_stat.MOUNTS", listing)
    mounts = Mounts()
    remote, local = mounts.of("/mnt/two words/model/x"), mounts.of("/mnt/two")
    assert remote is not None
    assert local is not None
    assert (remote.label, remote.is_remote) == ("nfs4 server:/export /export rw,vers=4.2", True)
    assert (local.point, local.is_remote) == ("/", False)
