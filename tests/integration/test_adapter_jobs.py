"""Jobs with an adapter: published beside their checkpoint, measured as rows, answered, kept and removed with it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from safetensors import safe_open

from qbatch.core.adapter_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qbatch.core.domain import DeviceKind, Method, Protocol, ProtocolOptions, Scheme, Stage
from qbatch.core.errors import DiskFull
from qbatch.core.manifest import MANIFEST, Manifest
from qbatch.core.recovery import Recovery, RecoveryKind
from qbatch.worker.checkpoints.verify import verify
from qbatch.worker.files.staging import KEPT_TRAININGS
from qbatch.worker.recovering.distillation import recover_by_training
from qbatch.worker.runner import adapter_publication
from qbatch.worker.runner.messages import (
    CheckpointReady,
    Entered,
    Failed,
    Measured,
    Resolved,
    RunnerMessage,
    Stepped,
)
from tests.bundles import TEXT_HASH, Ear, measure_quickly, run_bundle
from tests.tiny import make_causal
from tests.unit.benchmark_models import QUICK, TEXT

NF4, SVD, ACT = 1, 2, 3
PLAIN = Scheme(method=Method.NF4)
SCHEMES = {
    NF4: PLAIN,
    SVD: replace(PLAIN, recovery=Recovery.of(RecoveryKind.SVD, 4, TEXT_HASH)),
    ACT: replace(PLAIN, recovery=Recovery.of(RecoveryKind.SVD_ACT, 4, TEXT_HASH)),
}


@pytest.fixture(autouse=True)
def a_quick_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_quickly(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_causal(tmp_path / "llama", dtype="bfloat16")


def run(source: Path, attempt: int = 1, schemes: Mapping[int, Scheme] = SCHEMES) -> Ear:
    return run_bundle(source, schemes, attempt=attempt)


def places(ear: Ear) -> dict[int, str]:
    """The path that each job's outcome is recorded with."""
    return {m.job_id: m.published.path for m in ear.heard if isinstance(m, CheckpointReady)}


def failures(ear: Ear) -> dict[int, str]:
    return {m.job_id: m.message for m in ear.heard if isinstance(m, Failed)}


def test_each_adapter_is_published_beside_its_checkpoint_and_measured(source: Path) -> None:
    ear = run(source)
    assert failures(ear) == {}
    assert ear.measured() == {NF4, SVD, ACT}
    paths, storage = places(ear), source.parent / "storage"
    base = paths[NF4]
    assert paths[SVD].startswith(f"{base}+svd-r4-")
    assert paths[ACT].startswith(f"{base}+svd-act-r4-")
    assert len(list((storage / base).parent.iterdir())) == 3
    rows = ear.measurements()
    for job_id in (SVD, ACT):
        folder = storage / paths[job_id]
        assert {ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST} <= {path.name for path in folder.iterdir()}
        manifest, of_base = Manifest.read(folder), Manifest.read(storage / base)
        assert manifest is not None
        assert of_base is not None
        assert manifest.base_key == of_base.key
        named = json.loads((folder / MANIFEST).read_text())["base"]
        assert named == {"key": of_base.key, "name": Path(base).name, "root_sha256": of_base.root_sha256}
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            values = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        plain, row = rows[NF4], rows[job_id]
        # PEFT holds the factors in float32.
        assert row.weights_bytes == plain.weights_bytes + 4 * values
        assert row.disk_bytes == plain.disk_bytes + (folder / ADAPTER_WEIGHTS).stat().st_size
        assert row.num_parameters == plain.num_parameters
        assert row.bits_per_param > plain.bits_per_param
        assert row.kl_mean is not None or row.details.quality.reason is not None
        assert row.decode_tokens_per_s is not None
        assert row.details.checkpoint_key == manifest.key
        assert row.details.base_key == of_base.key
        assert row.details.audit.recovered_layers == 14
        assert row.details.audit.loaders is None
        assert verify(folder) == []
        assert row.details.audit.quantized_fraction == plain.details.audit.quantized_fraction
    assert any("recovering, layer 11 of 14" in m.step for m in ear.heard if isinstance(m, Stepped))


def test_an_adapter_makes_the_checkpoint_that_it_belongs_to(source: Path) -> None:
    ear = run(source, schemes={SVD: SCHEMES[SVD]})
    assert ear.measured() == {SVD}
    storage = source.parent / "storage"
    path = places(ear)[SVD]
    assert (storage / path / ADAPTER_WEIGHTS).is_file()
    assert Manifest.read(storage / path.partition("+")[0]) is not None
    # What the outcome is recorded with is the adapter, whenever it comes.
    ready = [m.published.path for m in ear.heard if isinstance(m, CheckpointReady)]
    assert ready[-1] == path
    assert path.partition("+")[0] in ready


def test_a_retried_job_reuses_what_is_published(source: Path) -> None:
    first = run(source)
    storage = source.parent / "storage"
    written = {path: (storage / path / MANIFEST).stat().st_ino for path in places(first).values()}
    again = run(source, attempt=2)
    assert again.measured() == {NF4, SVD, ACT}
    assert places(again) == places(first)
    assert again.entered(Stage.QUANTIZING) == set()
    assert {path: (storage / path / MANIFEST).stat().st_ino for path in places(again).values()} == written


def test_a_damaged_adapter_is_made_anew_and_its_checkpoint_stays(source: Path) -> None:
    first = run(source, schemes={NF4: PLAIN, SVD: SCHEMES[SVD]})
    storage = source.parent / "storage"
    paths = places(first)
    damaged = storage / paths[SVD] / ADAPTER_WEIGHTS
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = run(source, attempt=2, schemes={NF4: PLAIN, SVD: SCHEMES[SVD]})
    assert again.measured() == {NF4, SVD}
    assert damaged.read_bytes() == content
    assert again.entered(Stage.QUANTIZING) == {SVD}
    assert [path.name for path in damaged.parent.parent.glob("*.rejected-*")] != []


def test_a_checkpoint_that_is_gone_is_made_anew_for_its_adapter(source: Path) -> None:
    schemes = {SVD: SCHEMES[SVD]}
    storage = source.parent / "storage"
    path = places(run(source, schemes=schemes))[SVD]
    shutil.rmtree(storage / path.partition("+")[0])
    again = run(source, attempt=2, schemes=schemes)
    assert again.measured() == {SVD}
    assert Manifest.read(storage / path.partition("+")[0]) is not None


def test_the_size_alone_is_counted_without_loading(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = run(source, schemes={SVD: SCHEMES[SVD]}).measurements()[SVD]

    def sizes(_options: ProtocolOptions, _kind: DeviceKind) -> Protocol:
        return replace(QUICK, eval_text_sha256=TEXT_HASH, quality=False, speed=False, why=False)

    monkeypatch.setattr(ProtocolOptions, "for_device", sizes)
    counted = run(source, attempt=2, schemes={SVD: SCHEMES[SVD]}).measurements()[SVD]
    for name in ("weights_bytes", "disk_bytes", "num_parameters", "bits_per_param", "memory_footprint_bytes"):
        assert getattr(counted, name) == getattr(loaded, name), name


def test_identities_differ_by_what_is_recovered(source: Path) -> None:
    ear = run(source)
    (resolved,) = [m for m in ear.heard if isinstance(m, Resolved)]
    keys = {job_id: one.key for job_id, one in resolved.jobs.items()}
    assert len(set(keys.values())) == 3
    assert {resolved.jobs[job_id].base_key for job_id in (SVD, ACT)} == {keys[NF4]}
    assert resolved.jobs[NF4].base_key is None


def test_a_model_without_a_tokenizer_fails_only_where_a_text_is_read(source: Path) -> None:
    for path in source.glob("*token*"):
        path.unlink()
    ear = run(source)
    assert ear.measured() == {NF4, SVD}
    assert ear.failed() == {ACT: "unsupported"}
    assert "svd-act reads a text" in failures(ear)[ACT]
    assert all(isinstance(m, Measured) is (m.job_id in (NF4, SVD)) for m in ear.heard if isinstance(m, Measured))


QLORA = 4
TRAINED_TEXT = "\n".join([*topics.values()][60:64])
TRAINED_HASH = hashlib.sha256(TRAINED_TEXT.encode()).hexdigest()
TRAINED = replace(
    PLAIN,
    recovery=replace(Recovery.of(RecoveryKind.QLORA, 4, TRAINED_HASH, 3), window=32, windows=4),
)


def train(source: Path, text: str = TRAINED_TEXT, attempt: int = 1) -> Ear:
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    assert TRAINED.recovery is not None
    scheme = replace(TRAINED, recovery=replace(TRAINED.recovery, text_sha256=sha256))
    return run_bundle(source, {QLORA: scheme}, attempt=attempt, texts={sha256: text})


def test_a_trained_adapter_is_a_row_and_its_training_is_kept_until_then(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recover_by_training.__kwdefaults__, "kept_every_s", 0.0)
    publish = adapter_publication.publish_adapter
    monkeypatch.setattr(adapter_publication, "publish_adapter", _full_disk)
    failed = train(source)
    assert failed.failed() == {QLORA: "disk_full"}
    trainings = source.parent / "storage" / KEPT_TRAININGS
    (kept,) = trainings.iterdir()
    monkeypatch.setattr(adapter_publication, "publish_adapter", publish)
    ear = train(source, attempt=2)
    assert ear.measured() == {QLORA}
    assert "+qlora-r4-s3-" in places(ear)[QLORA]
    row = ear.measurements()[QLORA]
    assert row.details.audit.training.steps == 3
    assert row.details.audit.training.resumed_after_step == 3
    assert not kept.exists()


def _full_disk(*_args: object, **_kwargs: object) -> None:
    raise DiskFull("no space")


def test_a_text_that_shares_a_passage_with_another_trains_nothing(source: Path) -> None:
    ear = train(source, f"{TRAINED_TEXT}\n{TEXT}")
    assert ear.failed() == {QLORA: "unsupported"}
    assert "the recovery text shares 13 tokens in a row with an evaluation text" in failures(ear)[QLORA]
    assert not any("recovering" in m.step for m in ear.heard if isinstance(m, Stepped))


class _Killing(Ear):
    """A supervisor whose runner is killed once it has said that it enters a stage, or that something is published."""

    def __init__(self, at: Stage | type[CheckpointReady], path: str) -> None:
        super().__init__()
        self._at, self._path = at, path

    def send(self, message: RunnerMessage) -> None:
        is_stage = isinstance(message, Entered) and message.stage is self._at and SVD in message.job_ids
        is_ready = isinstance(message, CheckpointReady) and self._at is CheckpointReady
        if is_stage or (is_ready and self._path in message.published.path):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("at", [Stage.QUANTIZING, Stage.PUBLISHING, CheckpointReady, Stage.LOADING, Stage.BENCHMARKING])
def test_a_kill_leaves_an_adapter_whole_or_not_there(
    source: Path, monkeypatch: pytest.MonkeyPatch, at: Stage | type[CheckpointReady]
) -> None:
    schemes = {SVD: SCHEMES[SVD]}
    child = multiprocessing.get_context("fork").Process(
        target=run_bundle, args=(source, schemes), kwargs={"ear": _Killing(at, "+svd-")}
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    storage = source.parent / "storage"
    before = {path.name: path.stat().st_ino for path in (storage / "checkpoints").glob("*/*+svd-*")}
    assert len(before) == (at not in (Stage.QUANTIZING, Stage.PUBLISHING))
    again = run(source, attempt=2, schemes=schemes)
    assert again.measured() == {SVD}
    (adapter,) = (storage / "checkpoints").glob("*/*+svd-*")
    assert verify(adapter) == []
    assert before in ({}, {adapter.name: adapter.stat().st_ino}), "what is published is not written again"
    assert again.entered(Stage.QUANTIZING) == (set() if before else {SVD})
