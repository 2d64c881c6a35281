"""A source must not affect the worker that opens it, unless the job or the worker's settings permit it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qbatch.core.domain import DType, Method, Scheme, SourceRef
from qbatch.core.errors import (
    JobError,
    SourceChanged,
    SourceCorrupt,
    SourceNotFound,
    StorageUnavailable,
    UnsafeSource,
    Unsupported,
    UsageError,
)
from qbatch.core.settings import Settings
from qbatch.core.sources import INDEX_NAME, PICKLE_INDEX_NAME, PICKLE_NAME, SINGLE_NAME
from qbatch.models_db.result_filter import ResultFilter
from qbatch.models_db.results import find_results
from qbatch.models_db.session import Database
from qbatch.scheduler.local_stack import prepare_home
from qbatch.worker.checkpoints.published import checkpoint_path
from qbatch.worker.files.content import NoDigestCache
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from qbatch.worker.sources.fetch import LocalSource, fetch_source
from qbatch.worker.sources.pickles import convert
from qbatch.worker.sources.repository import Repository
from qbatch.worker.sources.source_policy import SourcePolicy
from tests import tiny
from tests.model_lists import read_model_list
from tests.rows import a_batch
from tests.source_identity import fingerprint

PLENTY = 2**40
ALLOWED = SourcePolicy(roots=None, allow_pickle=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied weights, as safetensors: the output head is not stored."""
    return tiny.make_causal(tmp_path_factory.mktemp("llama"), dtype="bfloat16", tie_word_embeddings=True)


@pytest.fixture
def pickled(llama: Path, tmp_path: Path) -> Path:
    """The same as ``pytorch_model.bin``: both names of the tied weight, one storage."""
    folder = tmp_path / "pickled"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(state_dict(llama), folder / PICKLE_NAME)
    return folder


def state_dict(source: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(source / SINGLE_NAME)
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def opened(folder: Path, home: Path, policy: SourcePolicy = ALLOWED, *, room: int = PLENTY) -> LocalSource:
    source = SourceRef(name=folder.name, location=str(folder), is_folder=True)
    with fetch_source(
        source,
        cache=home / "cache",
        cache_bytes=room,
        policy=policy,
        on_progress=lambda *_: None,
        digests=NoDigestCache(),
    ) as local:
        return local


def refused(folder: Path, home: Path, policy: SourcePolicy = ALLOWED, *, room: int = PLENTY) -> JobError:
    with pytest.raises(JobError) as caught:
        opened(folder, home, policy, room=room)
    assert "\n" not in str(caught.value)
    return caught.value


# pickles


def test_pickles_are_refused_unless_the_job_allows_them(pickled: Path, tmp_path: Path) -> None:
    error = refused(pickled, tmp_path, SourcePolicy(roots=None))
    assert (type(error), "--allow-pickle" in str(error)) == (UnsafeSource, True)
    assert not (tmp_path / "cache").exists()


def test_an_allowed_pickle_becomes_safetensors_with_everything_beside_it(pickled: Path, tmp_path: Path) -> None:
    local = opened(pickled, tmp_path)
    assert local.folder.parent == tmp_path / "cache"
    expected = {path.name for path in pickled.iterdir()} - {PICKLE_NAME} | {SINGLE_NAME}
    assert {path.name for path in local.folder.iterdir()} == expected
    written, stored = load_file(local.folder / SINGLE_NAME), torch.load(pickled / PICKLE_NAME)
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)


@pytest.mark.parametrize("method", [Method.NF4, Method.INT8])
def test_a_checkpoint_does_not_show_that_its_source_was_pickled(
    llama: Path, pickled: Path, tmp_path: Path, method: Method
) -> None:
    for number, source in enumerate((llama, opened(pickled, tmp_path).folder)):
        folder = tmp_path / str(number)
        folder.mkdir()
        target = Target(scheme=Scheme(method=method, compute_dtype=DType.BFLOAT16), folder=folder)
        (outcome,) = write_checkpoints(
            source, [target], dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None
        )
        assert isinstance(outcome, Written), outcome
    assert (tmp_path / "0" / SINGLE_NAME).read_bytes() == (tmp_path / "1" / SINGLE_NAME).read_bytes()


def test_it_is_converted_once(pickled: Path, tmp_path: Path) -> None:
    first = opened(pickled, tmp_path)
    made_at = (first.folder / SINGLE_NAME).stat().st_mtime_ns
    again = opened(pickled, tmp_path)
    assert (again.folder, again.fingerprint) == (first.folder, first.fingerprint)
    assert (first.folder / SINGLE_NAME).stat().st_mtime_ns == made_at
    (first.folder / SINGLE_NAME).write_bytes(b"cut short")
    opened(pickled, tmp_path)
    assert load_file(first.folder / SINGLE_NAME)


def test_a_converted_file_whose_bytes_changed_is_converted_anew(pickled: Path, tmp_path: Path) -> None:
    converted = opened(pickled, tmp_path).folder / SINGLE_NAME
    sound = converted.read_bytes()
    converted.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert opened(pickled, tmp_path).folder == converted.parent
    assert converted.read_bytes() == sound


def test_pickles_that_change_during_their_conversion_leave_nothing(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = (pickled / PICKLE_NAME).read_bytes()
    others = {name: tensor + 1 for name, tensor in torch.load(pickled / PICKLE_NAME).items()}

    def changed_meanwhile(*args: Any, **options: Any) -> None:
        torch.save(others, pickled / PICKLE_NAME)
        convert(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr("qbatch.worker.sources.pickles.convert", changed_meanwhile)
        assert isinstance(refused(pickled, tmp_path), SourceChanged)
    (pickled / PICKLE_NAME).write_bytes(sound)
    converted = load_file(opened(pickled, tmp_path).folder / SINGLE_NAME)
    expected = torch.load(pickled / PICKLE_NAME)
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_its_identity_is_its_content_and_not_that_of_safetensors(pickled: Path, tmp_path: Path) -> None:
    first = opened(pickled, tmp_path)
    moved = opened(pickled.rename(tmp_path / "moved"), tmp_path)
    assert moved.fingerprint == first.fingerprint
    assert fingerprint(first.folder) != first.fingerprint
    weights = tmp_path / "moved" / PICKLE_NAME
    before = weights.stat()
    state = torch.load(weights)
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    torch.save(state, weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    assert opened(tmp_path / "moved", tmp_path).fingerprint != first.fingerprint


def test_a_tokenizer_that_changes_beside_the_same_weights_is_taken_along(pickled: Path, tmp_path: Path) -> None:
    first = opened(pickled, tmp_path)
    (pickled / "chat_template.jinja").write_text("{{ another }}")
    second = opened(pickled, tmp_path)
    assert second.fingerprint != first.fingerprint
    assert (second.folder / "chat_template.jinja").read_text() == "{{ another }}"


def test_the_old_format_is_converted_too(llama: Path, pickled: Path, tmp_path: Path) -> None:
    torch.save(state_dict(llama), pickled / PICKLE_NAME, _use_new_zipfile_serialization=False)
    assert load_file(opened(pickled, tmp_path).folder / SINGLE_NAME).keys() == state_dict(llama).keys()


def test_every_shard_of_an_index_becomes_one(llama: Path, pickled: Path, tmp_path: Path) -> None:
    state = state_dict(llama)
    shard(pickled, state)
    local = opened(pickled, tmp_path)
    index = json.loads((local.folder / INDEX_NAME).read_text())
    assert index["weight_map"].keys() == state.keys()
    assert not (local.folder / PICKLE_INDEX_NAME).exists()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(local.folder / file)[name], state[name])


def shard(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Spread ``state`` over two pickles and their index."""
    (folder / PICKLE_NAME).unlink()
    halves = list(state.items())[::2], list(state.items())[1::2]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(dict(half), folder / file)
        weight_map |= {name: file for name, _ in half}
    (folder / PICKLE_INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("named", ["../outside.bin", "/etc/passwd", "missing.bin", "model.safetensors", "nul\0.bin", 7])
def test_a_pickle_index_names_files_of_its_folder(llama: Path, pickled: Path, tmp_path: Path, named: Any) -> None:
    weight_map = shard(pickled, state_dict(llama))
    torch.save(state_dict(llama), tmp_path / "outside.bin")
    (pickled / PICKLE_INDEX_NAME).write_text(json.dumps({"weight_map": weight_map | {"x": named}}))
    assert type(refused(pickled, tmp_path)) is SourceCorrupt


def test_a_name_in_two_shards_is_corrupt(llama: Path, pickled: Path, tmp_path: Path) -> None:
    shard(pickled, state_dict(llama))
    for path in pickled.glob("*.bin"):
        torch.save(state_dict(llama), path)
    assert type(refused(pickled, tmp_path)) is SourceCorrupt


class Canary:
    """An object that creates a folder when plain pickle loads it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._path),)


def write_archive(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("form", ["archive", "bare", "legacy"])
def test_a_pickle_that_runs_code_is_unsafe_and_runs_none(
    llama: Path, pickled: Path, tmp_path: Path, protocol: int, form: str
) -> None:
    canary = tmp_path / "canary"
    state = {"a": Canary(canary)}
    raw = pickle.dumps(state, protocol=protocol)
    weights = pickled / PICKLE_NAME
    if form == "archive":
        write_archive(weights, raw)
    elif form == "legacy":
        torch.save(state, weights, pickle_protocol=max(protocol, 1), _use_new_zipfile_serialization=False)
    else:
        weights.write_bytes(raw)
    assert type(refused(pickled, tmp_path)) is UnsafeSource
    assert not canary.exists()
    pickle.loads(raw)  # noqa: S301
    assert canary.exists(), "the canary sings where it may"


def test_a_script_module_is_unsafe(pickled: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(pickled / PICKLE_NAME, "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/version", "3")
    assert type(refused(pickled, tmp_path)) is UnsafeSource


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"\x80\x02", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n", b"<html></html>"],
)
def test_a_file_that_is_not_a_pickle_is_corrupt(pickled: Path, tmp_path: Path, content: bytes) -> None:
    (pickled / PICKLE_NAME).write_bytes(content)
    assert type(refused(pickled, tmp_path)) is SourceCorrupt


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_truncated_pickle_is_corrupt(llama: Path, pickled: Path, tmp_path: Path, is_zip: bool) -> None:
    weights = pickled / PICKLE_NAME
    torch.save(state_dict(llama), weights, _use_new_zipfile_serialization=is_zip)
    whole = weights.read_bytes()
    for part in (0.1, 0.5, 0.99):
        weights.write_bytes(whole[: int(len(whole) * part)])
        assert type(refused(pickled, tmp_path)) is SourceCorrupt
    assert not list((tmp_path / "cache").glob("*/*.safetensors"))


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ([torch.ones(2)], SourceCorrupt),
        ({}, SourceCorrupt),
        ({"state_dict": {"a": torch.ones(2)}}, SourceCorrupt),
        ({"a": 1}, SourceCorrupt),
        ({1: torch.ones(2)}, SourceCorrupt),
        ({"two\nlines": torch.ones(2)}, SourceCorrupt),
        ({"__metadata__": torch.ones(2)}, SourceCorrupt),
        ({"a": torch.ones(1).expand(2**40)}, SourceCorrupt),
        ({str(n): shared for shared in [torch.ones(2**16)] for n in range(100)}, SourceCorrupt),
        ({"a": torch.ones(2, device="meta")}, Unsupported),
        ({"a": torch.eye(3).to_sparse()}, Unsupported),
        ({"a": torch.ones(2, dtype=torch.complex128)}, Unsupported),
    ],
    ids=str,
)
def test_a_pickle_without_a_plain_state_dict_is_refused(
    pickled: Path, tmp_path: Path, state: Any, kind: type[JobError]
) -> None:
    torch.save(state, pickled / PICKLE_NAME)
    assert type(refused(pickled, tmp_path)) is kind


def test_a_compressed_archive_is_refused(llama: Path, pickled: Path, tmp_path: Path) -> None:
    weights = pickled / PICKLE_NAME
    with zipfile.ZipFile(weights) as stored, zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as deflated:
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    (tmp_path / "x").replace(weights)
    error = refused(pickled, tmp_path)
    assert (type(error), "compressed" in str(error)) == (SourceCorrupt, True)


def test_views_and_parameters_are_written_as_they_look(pickled: Path, tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "whole": torch.nn.Parameter(base),
        "turned": base.T,
        "part": base[1:, ::2],
        "none": base[:0],
        "n": base[0, 1],
    }
    torch.save(state, pickled / PICKLE_NAME)
    written = load_file(opened(pickled, tmp_path).folder / SINGLE_NAME)
    assert all(torch.equal(written[name], state[name].detach()) for name in state)


def test_safetensors_win_where_both_are_there(pickled: Path, llama: Path, tmp_path: Path) -> None:
    (pickled / PICKLE_NAME).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    shutil.copy(llama / SINGLE_NAME, pickled)
    for policy in (ALLOWED, SourcePolicy(roots=None)):
        local = opened(pickled, tmp_path, policy)
        assert (local.folder, local.fingerprint) == (pickled, fingerprint(pickled))
    assert not (tmp_path / "canary").exists()


def test_the_cache_is_bounded_for_converted_models_too(pickled: Path, tmp_path: Path) -> None:
    error = refused(pickled, tmp_path, room=1000)
    assert (type(error), "QBATCH_CACHE_BYTES" in str(error)) == (Unsupported, True)
    assert not list((tmp_path / "cache").glob("*/*.safetensors"))


@pytest.mark.parametrize("name", ["model.pt", "consolidated.00.pth", "last.ckpt", "weights.pkl"])
def test_other_pickles_are_refused_whatever_is_allowed(pickled: Path, tmp_path: Path, name: str) -> None:
    (pickled / PICKLE_NAME).rename(pickled / name)
    assert type(refused(pickled, tmp_path)) is UnsafeSource


def test_a_pickle_without_config_is_no_model(pickled: Path, tmp_path: Path) -> None:
    (pickled / "config.json").unlink()
    assert type(refused(pickled, tmp_path)) is SourceNotFound


# places


@pytest.fixture
def roots(llama: Path, tmp_path: Path) -> Path:
    """``inside`` contains a model and links; ``outside`` is not an allowed root."""
    for place in ("inside", "outside"):
        shutil.copytree(llama, tmp_path / place / "model")
    return tmp_path


def linked(roots: Path, name: str) -> Path:
    """A folder in ``inside`` whose weights are a link to those outside."""
    folder = roots / "inside" / name
    shutil.copytree(roots / "inside" / "model", folder)
    (folder / SINGLE_NAME).unlink()
    (folder / SINGLE_NAME).symlink_to(roots / "outside" / "model" / SINGLE_NAME)
    return folder


def check_both(folder: Path, home: Path, roots: tuple[Path, ...] | None) -> tuple[str, str]:
    """The answers of submit and of a worker to a folder."""
    return (
        _verdict(UsageError, lambda: read_model_list(["# a comment", str(folder)], check_folders=False, roots=roots)),
        _verdict(UnsafeSource, lambda: opened(folder, home, SourcePolicy(roots=roots))),
    )


def _verdict(refusal: type[Exception], take: Callable[[], object]) -> str:
    try:
        take()
    except refusal as error:
        return "refused" if refusal is UnsafeSource or str(error).startswith("line 2: ") else "refused without a line"
    return "taken"


REFUSED, TAKEN = ("refused", "refused"), ("taken", "taken")


def test_a_folder_must_lie_in_a_root(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = (roots / "inside", roots / "another")
    monkeypatch.chdir(roots / "inside")
    assert check_both(roots / "inside" / "model", roots, allowed) == TAKEN
    for outside in (
        roots / "outside" / "model",
        roots / "inside" / ".." / "outside" / "model",
        Path("../outside/model"),
        Path("/etc"),
        roots,
    ):
        assert check_both(outside, roots, allowed) == REFUSED, outside


def test_a_root_s_name_is_not_a_prefix(roots: Path) -> None:
    (roots / "outside").rename(roots / "inside-not")
    assert check_both(roots / "inside-not" / "model", roots, (roots / "inside",)) == REFUSED


def test_links_are_followed_before_a_folder_is_judged(roots: Path) -> None:
    allowed = (roots / "inside",)
    (roots / "inside" / "way-out").symlink_to(roots / "outside" / "model")
    (roots / "outside" / "way-in").symlink_to(roots / "inside" / "model")
    assert check_both(roots / "inside" / "way-out", roots, allowed) == REFUSED
    assert check_both(roots / "outside" / "way-in", roots, allowed) == TAKEN
    (roots / "root").symlink_to(roots / "inside")
    assert check_both(roots / "inside" / "model", roots, (roots / "root",)) == TAKEN


def test_what_a_folder_s_links_lead_to_must_lie_in_a_root_too(roots: Path) -> None:
    folder = linked(roots, "linked")
    assert check_both(folder, roots, (roots / "inside",)) == REFUSED
    assert check_both(folder, roots, (roots / "inside", roots / "outside")) == TAKEN
    assert check_both(folder, roots, None) == TAKEN
    notes = roots / "inside" / "model" / "notes.txt"
    notes.symlink_to("/etc/hostname")
    assert check_both(notes.parent, roots, (roots / "inside",)) == REFUSED, "it would be copied to the checkpoint"


def test_a_linked_folder_s_own_links_must_lie_in_a_root_too(roots: Path) -> None:
    """The patterns of files copied next to the weights follow both kinds of links."""
    folder, elsewhere = roots / "inside" / "model", roots / "inside" / "elsewhere"
    elsewhere.mkdir()
    (folder / "additional_chat_templates").symlink_to(elsewhere)
    (elsewhere / "itself").symlink_to(elsewhere)
    assert check_both(folder, roots, (roots / "inside",)) == TAKEN
    (elsewhere / "environment.jinja").symlink_to("/proc/self/environ")
    assert check_both(folder, roots, (roots / "inside",)) == REFUSED


def test_a_hugging_face_cache_is_a_root_like_any_other(roots: Path, llama: Path) -> None:
    """A snapshot in the Hugging Face cache consists of links to ../../blobs."""
    repository = roots / "inside" / "models--org--model"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in llama.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert check_both(snapshot, roots, (roots / "inside",)) == TAKEN


def test_without_a_root_no_folder_is_taken(roots: Path) -> None:
    assert check_both(roots / "inside" / "model", roots, ()) == REFUSED


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("../model", None),
        ("/etc", None),
        ("org/../../model", None),
        ("org/model/more", None),
        ("org--model", None),
        ("org/model", "../../../snapshots"),
        ("org/model", "/etc"),
        ("org/model", ""),
        ("org/mod\nel", None),
    ],
)
def test_a_forged_row_leads_to_no_other_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, revision: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    source = SourceRef(name=name, location=name, revision=revision)
    with (
        pytest.raises(UnsafeSource),
        fetch_source(
            source,
            cache=tmp_path / "cache",
            cache_bytes=PLENTY,
            policy=ALLOWED,
            on_progress=lambda *_: None,
            digests=NoDigestCache(),
        ),
    ):
        pytest.fail("it was opened")
    assert list(tmp_path.iterdir()) == []


# what names become

hostile_names = st.text(max_size=300) | st.sampled_from(
    [
        "..",
        "../..",
        "/etc/passwd",
        "a/..",
        ".hidden",
        "-rf",
        "con\0trol",
        "a/" * 200,
        "\u202e",
        "~root",
        "$(x)",
        "a;b",
        "",
    ]
)


@given(name=hostile_names)
@settings(max_examples=300, deadline=None)
def test_a_model_of_any_name_has_a_place_under_the_storage(name: str) -> None:
    path = checkpoint_path(name, Scheme(method=Method.NF4), "0123456789abcdef" * 4)
    assert re.fullmatch(r"checkpoints/[A-Za-z0-9][A-Za-z0-9._-]{0,79}/bnb-nf4-[0-9a-f]{16}", path)
    assert not {"..", "."} & set(path.split("/"))
    assert Repository(repo_id=name, commit="0" * 40, files={}).entry.count("/") == 0


def test_a_pickled_folder_s_name_stays_out_of_the_cache_s_paths(pickled: Path, tmp_path: Path) -> None:
    local = opened(pickled.rename(tmp_path / "-..;$(touch x)\n--"), tmp_path)
    assert re.fullmatch(r"[A-Za-z0-9._-]+--[0-9a-f]{16}", local.folder.name)
    assert local.folder.parent == tmp_path / "cache"


# queries and sockets


@pytest.mark.parametrize(
    "sort",
    ["1; DROP TABLE jobs", "job_id; --", "(SELECT name)", "jobs.id", "-", "", "job_id DESC", "details", "__class__"],
)
def test_a_column_to_sort_by_comes_from_a_list(database: Database, sort: str) -> None:
    a_batch(database)
    with database.read() as session, pytest.raises(UsageError, match="cannot sort by"):
        find_results(session, sort=sort)


@pytest.mark.parametrize("model", ["' OR 1=1 --", "%", "_", "/models/a'; DROP TABLE jobs; --", "\\"])
def test_a_name_to_filter_by_is_a_value_and_no_pattern(database: Database, model: str) -> None:
    a_batch(database)
    with database.read() as session:
        assert find_results(session, only=ResultFilter(models=[model])) == []
        assert len(find_results(session, only=ResultFilter(models=["/models/a"]))) == 3


def test_the_embedded_redis_has_a_directory_of_its_user_s_own(tmp_path: Path) -> None:
    settings = Settings.from_env({"QBATCH_HOME": str(tmp_path / "home")})
    place = settings.socket_dir
    try:
        prepare_home(settings)
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        prepare_home(settings)
        place.chmod(0o750)
        with pytest.raises(StorageUnavailable, match="private"):
            prepare_home(settings)
        place.rmdir()
        place.symlink_to(tmp_path)
        with pytest.raises(StorageUnavailable):
            prepare_home(settings)
    finally:
        place.unlink() if place.is_symlink() else place.rmdir()
