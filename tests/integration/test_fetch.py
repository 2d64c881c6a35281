"""Sources, fetched by the real huggingface_hub from a hub on this machine, in processes of their own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qbatch.core.domain import SourceRef
from qbatch.core.errors import SourceCorrupt, SourceNotFound
from qbatch.core.sources import INDEX_NAME, PICKLE_INDEX_NAME, PICKLE_NAME, SINGLE_NAME
from qbatch.worker.files.content import NoDigestCache
from qbatch.worker.sources.fetch import LocalSource, fetch_source
from qbatch.worker.sources.source_policy import SourcePolicy
from tests.hub import Hub, serving
from tests.source_identity import fingerprint
from tests.waiting import until

_ROOT = Path(__file__).parents[2]
_WEIGHTS_BYTES = 100_000
_PLENTY = 2**40
_TOKEN = "hf_canary_that_no_log_may_show"  # noqa: S105
# For every line of standard input: fetches what it says, says what came of it in one line, and keeps the source in use
# until the next line.
_FETCH = """
import json, sys
from pathlib import Path
from qbatch.core.domain import SourceRef
from qbatch.core.errors import JobError
from qbatch.worker.files.content import NoDigestCache
from qbatch.worker.sources.fetch import fetch_source
from qbatch.worker.sources.source_policy import SourcePolicy

while line := sys.stdin.readline():
    name, revision, cache, room, allow_pickle, trusted = json.loads(line)
    source = SourceRef(name=name, location=name, revision=revision)
    policy = SourcePolicy(roots=(), trusted=frozenset(trusted), allow_pickle=allow_pickle)
    steps = []
    try:
        with fetch_source(
            source,
            cache=Path(cache),
            cache_bytes=room,
            policy=policy,
            on_progress=lambda *n: steps.append(n),
            digests=NoDigestCache(),
        ) as got:
            said = {"legacy": got.legacy_fingerprint}
            said |= {"folder": str(got.folder), "fingerprint": got.fingerprint, "revision": got.revision}
            said["runs_code"] = got.runs_code
            print(json.dumps(said | {"steps": steps, "torch": "torch" in sys.modules}), flush=True)
            sys.stdin.readline()
    except JobError as error:
        print(json.dumps({"kind": error.kind, "message": str(error)}), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """A process that fetches into ``cache``, one source at a time."""

    process: subprocess.Popen[str]
    cache: Path

    def start(
        self,
        name: str,
        *,
        revision: str | None = None,
        cache_bytes: int = _PLENTY,
        allow_pickle: bool = False,
        trusted: Sequence[str] = (),
    ) -> None:
        self._write(json.dumps([name, revision, str(self.cache), cache_bytes, allow_pickle, list(trusted)]))

    def said(self) -> dict[str, Any]:
        """What came of the fetch; the source stays in use until ``release``."""
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def release(self) -> None:
        self._write("")

    def fetch(self, name: str, **options: Any) -> dict[str, Any]:
        self.start(name, **options)
        said = self.said()
        if "kind" not in said:
            self.release()
        return said

    def entries(self) -> set[str]:
        """The repositories that the cache holds, by name."""
        return {path.name.rsplit("--", 1)[0] for path in self.cache.iterdir() if not path.name.startswith(".")}

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()


@contextmanager
def running(home: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A fetching process that has no other environment; nothing that it writes shows the token."""
    log = home / f"fetch-{time.monotonic_ns()}.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", _FETCH],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(_ROOT)]),
                "HOME": str(home),
                "HF_TOKEN": _TOKEN,
                "no_proxy": "127.0.0.1",
                # After 10 s it asks again, and some tests let it wait until another process has started.
                "HF_HUB_DOWNLOAD_TIMEOUT": "120",
                "HF_HUB_ETAG_TIMEOUT": "120",
            }
            | environment,
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()
    assert _TOKEN not in log.read_text()


@pytest.fixture(scope="module")
def module_hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(module_hub: Hub) -> Hub:
    module_hub.reset()
    return module_hub


@pytest.fixture(scope="module")
def process(module_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """One for all tests: to import the library takes longer than to fetch."""
    with running(tmp_path_factory.mktemp("home"), HF_ENDPOINT=module_hub.url) as process:
        yield process


@pytest.fixture
def node(process: subprocess.Popen[str], tmp_path: Path) -> Fetcher:
    return Fetcher(process=process, cache=tmp_path / "cache")


@contextmanager
def neighbour(node: Fetcher, hub: Hub) -> Iterator[Fetcher]:
    """A second process on the node's cache; it is killed when the context ends."""
    with running(node.cache.parent, HF_ENDPOINT=hub.url) as process:
        yield Fetcher(process=process, cache=node.cache)


def safetensors_bytes(data_bytes: int = _WEIGHTS_BYTES) -> bytes:
    """A file of one uint8 tensor."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [data_bytes], "data_offsets": [0, data_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(data_bytes)


def make_repository(folder: Path, files: Mapping[str, str | bytes] | None = None) -> Path:
    """A model of one weight file, and ``files`` beside it."""
    model: dict[str, str | bytes] = {"config.json": "{}", SINGLE_NAME: safetensors_bytes()}
    for name, content in (model | dict(files or {})).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def sharded(folder: Path) -> Path:
    """A repository without the single file: an index beside that would not be looked at."""
    (folder / SINGLE_NAME).unlink()
    return folder


def files_of(folder: str) -> set[str]:
    paths = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if path.parts[0] != ".cache"}


def test_a_fetch_brings_what_the_model_needs_and_nothing_else(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    needed: dict[str, str | bytes] = {
        "config.json": "{}",
        "generation_config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer.model": "sp",
        "chat_template.jinja": "{{ x }}",
        "additional_chat_templates/tool.jinja": "{{ y }}",
        "preprocessor_config.json": "{}",
        "LICENSE": "free",
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
        "1_Pooling/config.json": "{}",
        "2_Dense/model.safetensors": safetensors_bytes(8),
        INDEX_NAME: json.dumps({"weight_map": {"a": "model-1.safetensors"}}),
        "model-1.safetensors": safetensors_bytes(),
    }
    left: dict[str, str | bytes] = {
        "consolidated.safetensors": safetensors_bytes(),
        "original/model.safetensors": safetensors_bytes(),
        "pytorch_model.bin": "pickle",
        "pytorch_model.bin.index.json": "{}",
        "2_Dense/pytorch_model.bin": "pickle",
        "model.onnx": "graph",
        "modeling_own.py": "import os",
        "1_Pooling/own.py": "import os",
    }
    commit = hub.publish("org/model", sharded(make_repository(tmp_path / "served", needed | left)))
    got = node.fetch("org/model")
    assert (got["revision"], got["fingerprint"]) == (commit, fingerprint(Path(got["folder"])))
    assert got["legacy"] == f"hub:{commit}", "every file is what the hub says"
    assert Path(got["folder"]) == node.cache / f"org--model--{commit[:12]}"
    assert files_of(got["folder"]) == set(needed)
    assert (Path(got["folder"]) / "model-1.safetensors").read_bytes() == needed["model-1.safetensors"]
    total = sum(len(content) for content in needed.values())
    assert got["steps"][-1] == [total, total]
    assert {request.token for request in hub.requests} == {_TOKEN}


@pytest.mark.parametrize("shard", [{}, {"model-1.safetensors": safetensors_bytes()}], ids=["stale", "sound"])
def test_of_two_layouts_the_single_file_is_wanted_as_transformers_has_it(
    hub: Hub, node: Fetcher, tmp_path: Path, shard: dict[str, bytes]
) -> None:
    index = json.dumps({"weight_map": {"w": "model-1.safetensors"}})
    hub.publish("both", make_repository(tmp_path / "served", {INDEX_NAME: index, **shard}))
    assert files_of(node.fetch("both")["folder"]) == {"config.json", SINGLE_NAME}


def test_a_commit_that_is_there_is_not_downloaded_again(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    commit = hub.publish("model", make_repository(tmp_path / "served"))
    first = node.fetch("model")
    again = node.fetch("model", revision=commit)
    assert first["folder"] == again["folder"]
    assert hub.weight_gets() == [SINGLE_NAME]
    hashed = sum(path.stat().st_size for path in Path(again["folder"]).iterdir() if path.is_file())
    assert {total for _, total in again["steps"]} == {hashed}, "it is only hashed"
    assert not again["torch"]


def test_the_least_recently_used_source_makes_room(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        hub.publish(name, make_repository(tmp_path / name))
    room_for_two = 2 * _WEIGHTS_BYTES + 50_000
    (node.cache / "not-ours--0123456789ab").mkdir(parents=True)
    for name in ("a", "b", "a", "c"):
        node.fetch(name, cache_bytes=room_for_two)
    assert node.entries() == {"a", "c", "not-ours"}


def test_a_source_in_use_is_not_evicted(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        hub.publish(name, make_repository(tmp_path / name))
    room_for_two = 2 * _WEIGHTS_BYTES + 50_000
    with neighbour(node, hub) as user:
        user.start("a", cache_bytes=room_for_two)
        in_use = user.said()["folder"]
        node.fetch("b", cache_bytes=room_for_two)
        node.fetch("c", cache_bytes=room_for_two)
        assert node.entries() == {"a", "c"}
        assert files_of(in_use) == {"config.json", SINGLE_NAME}
        refused = node.fetch("b", cache_bytes=_WEIGHTS_BYTES + 50_000)
    assert refused["kind"] == "disk_full"
    assert node.entries() == {"a"}


def test_a_repository_larger_than_the_cache_is_unsupported(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    hub.publish("large", make_repository(tmp_path / "served"))
    refused = node.fetch("large", cache_bytes=_WEIGHTS_BYTES)
    assert refused["kind"] == "unsupported"
    assert "QBATCH_CACHE_BYTES" in refused["message"]
    assert hub.weight_gets() == []


def test_a_disk_without_room_is_disk_full_before_the_download(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    served = make_repository(tmp_path / "served")
    with (served / SINGLE_NAME).open("r+b") as sparse:
        sparse.truncate(shutil.disk_usage(tmp_path).free + 2**30)
    hub.publish("huge", served)
    assert node.fetch("huge", cache_bytes=2**60)["kind"] == "disk_full"
    assert hub.weight_gets() == []


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"config.json": "{}", "pytorch_model.bin": "pickle"}, "unsafe_source"),
        ({"config.json": "{}", "adapter_model.safetensors": "x"}, "source_not_found"),
        ({SINGLE_NAME: "x"}, "source_not_found"),
        ({"config.json": "{}", SINGLE_NAME: "truncated"}, "source_corrupt"),
        ({"config.json": "{}", INDEX_NAME: '{"weight_map": {"a": "b.safetensors"}}'}, "source_corrupt"),
        ({"config.json": "{}", INDEX_NAME: '{"weight_map": {"a": 3}}'}, "source_corrupt"),
    ],
    ids=["pickles", "adapter", "no config", "truncated", "missing shard", "broken index"],
)  # fmt: skip
def test_a_repository_without_a_valid_model_is_refused(
    hub: Hub, node: Fetcher, tmp_path: Path, files: Mapping[str, str], kind: str
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    for name, content in files.items():
        (served / name).write_text(content)
    hub.publish("org/model", served)
    refused = node.fetch("org/model")
    assert refused["kind"] == kind


def test_an_adapter_on_the_hub_names_its_base(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (served / "adapter_model.safetensors").write_text("x")
    hub.publish("org/adapter", served)
    refused = node.fetch("org/adapter")
    assert refused["kind"] == "source_not_found"
    assert "org/adapter has no model: it is an adapter for org/base, not a model" in refused["message"]


def test_an_old_sentence_transformer_on_the_hub_names_its_inner_folder(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    served = tmp_path / "served"
    (served / "0_Transformer").mkdir(parents=True)
    (served / "0_Transformer" / "config.json").write_text("{}")
    (served / "modules.json").write_text('[{"path": "0_Transformer"}]')
    hub.publish("org/sentences", served)
    refused = node.fetch("org/sentences")
    assert refused["kind"] == "source_not_found"
    assert "its model is in the folder 0_Transformer" in refused["message"]


def pickled_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.arange(5)}, file)
    return file.getvalue()


def test_a_cached_file_that_is_not_the_hubs_is_downloaded_anew(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    commit = hub.publish("model", make_repository(tmp_path / "served"))
    first = node.fetch("model")
    weights = Path(first["folder"]) / SINGLE_NAME
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + b"?")
    refused = node.fetch("model")
    assert (refused["kind"], SINGLE_NAME in refused["message"]) == ("fetch_error", True)
    again = node.fetch("model")
    assert (again["fingerprint"], again["legacy"]) == (first["fingerprint"], f"hub:{commit}")
    assert weights.read_bytes() == sound


def test_pickles_are_downloaded_only_where_they_are_allowed_and_alone(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    served = make_repository(tmp_path / "served", {PICKLE_NAME: pickled_bytes(), "training_args.bin": "pickle"})
    hub.publish("both", served)
    assert PICKLE_NAME not in files_of(node.fetch("both", allow_pickle=True)["folder"])
    (served / SINGLE_NAME).unlink()
    commit = hub.publish("pickled", served)
    assert node.fetch("pickled")["kind"] == "unsafe_source"
    assert not [request for request in hub.requests if request.path.endswith(".bin")]
    got = node.fetch("pickled", allow_pickle=True)
    assert (got["revision"], got["fingerprint"]) == (commit, fingerprint(served, allow_pickle=True))
    assert files_of(got["folder"]) == {"config.json", SINGLE_NAME}
    assert load_file(Path(got["folder"]) / SINGLE_NAME)["w"].tolist() == [0, 1, 2, 3, 4]
    assert not [request for request in hub.requests if request.path.endswith("training_args.bin")]
    assert node.fetch("pickled", allow_pickle=True)["folder"] == got["folder"]
    assert node.fetch("pickled")["kind"] == "unsafe_source", "what another job was allowed lies in the cache"


def test_pickled_shards_are_those_that_the_index_names(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    index = {"weight_map": {"w": "pytorch_model-1.bin"}}
    served = make_repository(
        tmp_path / "served",
        {"pytorch_model-1.bin": pickled_bytes(), "pytorch_model-2.bin": "x", PICKLE_INDEX_NAME: json.dumps(index)},
    )
    (served / SINGLE_NAME).unlink()
    hub.publish("sharded", served)
    assert files_of(node.fetch("sharded", allow_pickle=True)["folder"]) == {"config.json", SINGLE_NAME}
    assert not [request for request in hub.requests if request.path.endswith("pytorch_model-2.bin")]
    (served / PICKLE_INDEX_NAME).write_text('{"weight_map": {"w": "../../elsewhere.bin"}}')
    hub.publish("leading-out", served)
    assert node.fetch("leading-out", allow_pickle=True)["kind"] == "source_corrupt"
    (served / PICKLE_NAME).write_bytes(pickled_bytes())
    hub.publish("both-pickled", served)
    assert files_of(node.fetch("both-pickled", allow_pickle=True)["folder"]) == {"config.json", SINGLE_NAME}


def test_python_files_are_downloaded_only_where_the_model_is_trusted(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    auto_map = json.dumps({"auto_map": {"AutoConfig": "own.Config"}})
    commit = hub.publish("org/own", make_repository(tmp_path / "served", {"own.py": "x = 1", "config.json": auto_map}))
    plain = node.fetch("org/own", trusted=["org/other", "org", "own", "org/own@main", "ORG/OWN"])
    assert (plain["legacy"], plain["runs_code"]) == (f"hub:{commit}", False)
    assert "own.py" not in files_of(plain["folder"])
    proposed = node.fetch("org/own", revision=commit, trusted=["org/own", "org/own@main"])
    assert not proposed["runs_code"], "whoever submits chose that revision"
    assert node.fetch("org/own", revision=commit, trusted=[f"org/own@{commit}"])["runs_code"]
    trusted = node.fetch("org/own", trusted=["org/own"])
    assert "own.py" in files_of(trusted["folder"])
    assert trusted["runs_code"]
    assert trusted["fingerprint"] != plain["fingerprint"], "another model than the same without its code"
    hub.publish("org/plain", make_repository(tmp_path / "plain", {"own.py": "x = 1"}))
    assert not node.fetch("org/plain", trusted=["org/plain"])["runs_code"], "it names no code"


def test_what_the_hub_refuses_is_named(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    served = make_repository(tmp_path / "served")
    hub.publish("org/model", served)
    hub.publish("org/gated", served, gated=True)
    assert node.fetch("org/missing")["kind"] == "source_not_found"
    missing = node.fetch("org/model", revision="v9")
    assert (missing["kind"], "org/model@v9" in missing["message"]) == ("source_not_found", True)
    gated = node.fetch("org/gated")
    assert (gated["kind"], "HF_TOKEN" in gated["message"]) == ("source_gated", True)
    hub.token = _TOKEN
    assert files_of(node.fetch("org/gated")["folder"]) == {"config.json", SINGLE_NAME}


def test_a_broken_download_is_retryable_and_goes_on_where_it_ended(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    shards = {"model-1.safetensors": safetensors_bytes(), "model-2.safetensors": safetensors_bytes()}
    hub.publish("model", sharded(make_repository(tmp_path / "served", {INDEX_NAME: index, **shards})))
    hub.weight_faults.extend(["cut", "unavailable", "unavailable"])
    broken = node.fetch("model")
    assert broken["kind"] == "fetch_error"
    assert "\n" not in broken["message"]
    got = node.fetch("model")
    assert all((Path(got["folder"]) / name).read_bytes() == content for name, content in shards.items())


def test_a_hub_that_does_not_answer_is_retryable(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    hub.publish("model", make_repository(tmp_path / "served"))
    hub.unavailable = 1
    assert node.fetch("model")["kind"] == "fetch_error"
    assert node.fetch("model")["revision"]
    with running(tmp_path, HF_ENDPOINT="http://127.0.0.1:9") as process:
        assert Fetcher(process=process, cache=node.cache).fetch("model")["kind"] == "fetch_error"


def test_two_processes_that_want_one_commit_download_it_once(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    hub.publish("model", make_repository(tmp_path / "served"))
    hub.flowing.clear()
    with neighbour(node, hub) as other:
        node.start("model")
        other.start("model")
        until(lambda: bool(hub.weight_gets()) and _resolved(hub) == 2)
        hub.flowing.set()
        assert node.said()["folder"] == other.said()["folder"]
        node.release()
    assert hub.weight_gets() == [SINGLE_NAME]


def test_what_a_killed_download_left_is_evicted_first(hub: Hub, node: Fetcher, tmp_path: Path) -> None:
    for name in ("a", "dying", "b"):
        hub.publish(name, make_repository(tmp_path / name))
    room_for_two = 2 * _WEIGHTS_BYTES + 50_000
    node.fetch("a", cache_bytes=room_for_two)
    hub.flowing.clear()
    with neighbour(node, hub) as dying:
        dying.start("dying", cache_bytes=room_for_two)
        until(lambda: len(hub.weight_gets()) == 2)
    hub.flowing.set()
    assert node.entries() == {"a", "dying"}
    node.fetch("b", cache_bytes=room_for_two)
    assert node.entries() == {"a", "b"}


def test_offline_mode_uses_the_hugging_face_cache_alone(hub: Hub, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    repository = tmp_path / "huggingface" / "hub" / "models--org--model"
    snapshot = make_repository(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    with running(tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "huggingface")) as process:
        node = Fetcher(process=process, cache=tmp_path / "cache")
        got = node.fetch("org/model")
        (snapshot / SINGLE_NAME).unlink()
        refused = [node.fetch("org/model"), node.fetch("org/other")]
    assert (got["folder"], got["revision"]) == (str(snapshot), commit)
    assert [said["kind"] for said in refused] == ["source_not_found"] * 2
    assert all("HF_HUB_OFFLINE is set" in said["message"] for said in refused)
    assert hub.requests == []


def test_the_hugging_face_cache_counts_where_its_blobs_match_their_names(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    repository = tmp_path / "huggingface" / "hub" / "models--org--model"
    snapshot = make_repository(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        content = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        name = hashlib.sha256(content).hexdigest() if path.suffix == ".safetensors" else git.hexdigest()
        path.rename(repository / "blobs" / name)
        path.symlink_to(repository / "blobs" / name)
    with running(tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "huggingface")) as process:
        node = Fetcher(process=process, cache=tmp_path / "cache")
        sound = node.fetch("org/model")
        blob = (snapshot / SINGLE_NAME).resolve()
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
        replaced = node.fetch("org/model")
    assert (sound["legacy"], replaced["legacy"]) == (f"hub:{commit}", None)
    assert replaced["fingerprint"] != sound["fingerprint"], "under one commit, another model"


def test_a_folder_is_used_in_place_once_it_is_sound(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "model")
    with _folder(folder, tmp_path) as local:
        assert (local.folder, local.fingerprint, local.revision) == (folder, fingerprint(folder), None)
    assert not (tmp_path / "cache").exists()
    (folder / SINGLE_NAME).write_bytes(safetensors_bytes()[:-1])
    with pytest.raises(SourceCorrupt), _folder(folder, tmp_path):
        pytest.fail("a truncated file was let through")
    with pytest.raises(SourceNotFound), _folder(tmp_path / "nowhere", tmp_path):
        pytest.fail("a missing folder was let through")


def test_a_link_is_followed_once_so_that_nobody_can_turn_it_there_and_back(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "v1")
    (tmp_path / "current").symlink_to(folder)
    with _folder(tmp_path / "current", tmp_path) as local:
        assert local.folder == folder


def _folder(folder: Path, home: Path) -> AbstractContextManager[LocalSource]:
    source = SourceRef(name="model", location=str(folder), is_folder=True)
    return fetch_source(
        source,
        cache=home / "cache",
        cache_bytes=_PLENTY,
        policy=SourcePolicy(roots=None),
        on_progress=lambda *_: None,
        digests=NoDigestCache(),
    )


def _resolved(hub: Hub) -> int:
    return sum(
        request.path.startswith("/api/models/model") and "/tree/" not in request.path for request in hub.requests
    )
