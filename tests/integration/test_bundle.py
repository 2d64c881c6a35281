"""A bundle reuses what is already published, and the failure of one width does not affect the others."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from qbatch.core import filesystem, identity
from qbatch.core.domain import (
    Method,
    ProtocolOptions,
    Scheme,
    Stage,
)
from qbatch.core.errors import DiskFull, QuantizationError, SourceChanged, StorageError, Unsupported
from qbatch.core.filesystem import Refusal
from qbatch.worker import quantizing
from qbatch.worker.checkpoints import publish as publishing
from qbatch.worker.checkpoints.sidecars import copy_sidecars
from qbatch.worker.quantizing import Refused, Target
from qbatch.worker.runner.messages import (
    CheckpointReady,
    Entered,
    Failed,
    Measured,
    MeasurementsOver,
    NothingTimed,
    Progressed,
    Resolved,
    Stepped,
)
from qbatch.worker.runner.trial import Trial
from tests.bundles import TEXT_HASH, Ear, measure_quickly, run_bundle
from tests.tiny import make_causal, make_encoder
from tests.unit.benchmark_models import QUICK

NF4, INT8, TORCHAO = 1, 2, 3
SCHEMES = {NF4: Scheme(method=Method.NF4), INT8: Scheme(method=Method.INT8)}


@pytest.fixture(autouse=True)
def a_quick_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_quickly(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_causal(tmp_path / "llama", dtype="bfloat16")


def run(source: Path, attempt: int = 1, schemes: Mapping[int, Scheme] = SCHEMES) -> Ear:
    """The bundle of both widths of ``source``."""
    return run_bundle(source, schemes, attempt=attempt)


def places(ear: Ear, source: Path) -> dict[int, Path]:
    storage = source.parent / "storage"
    return {m.job_id: storage / m.published.path for m in ear.heard if isinstance(m, CheckpointReady)}


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files these are, and when they were written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_the_end_of_all_measurements_is_reported_before_the_last_row(source: Path) -> None:
    """From then on the next runner may prepare itself."""
    ear = run(source)
    heard = [type(message) for message in ear.heard]
    steps = {
        job_id: [m.step for m in ear.heard if isinstance(m, Stepped) and job_id in m.job_ids] for job_id in SCHEMES
    }
    for of_job in steps.values():
        assert [step for step in of_job if "speed" in step] == [
            f"speed, round {n + 1}/{QUICK.speed_rounds}" for n in range(QUICK.speed_rounds)
        ]
    assert heard.count(MeasurementsOver) == 1
    over = heard.index(MeasurementsOver)
    assert heard.index(Measured) < over < len(heard) - 1 - heard[::-1].index(Measured)


def test_where_no_model_is_run_the_next_bundle_is_prepared(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source is fetched and its runner started as soon as the checkpoints are published."""
    size = replace(QUICK, eval_text_sha256=TEXT_HASH, quality=False, speed=False)
    monkeypatch.setattr(ProtocolOptions, "for_device", lambda *_: size)
    heard = [type(message) for message in run(source).heard]
    assert heard.count(NothingTimed) == heard.count(MeasurementsOver) == 1
    moments = [heard.index(message) for message in (CheckpointReady, NothingTimed, MeasurementsOver, Measured)]
    assert moments == sorted(moments)


@pytest.mark.parametrize("make", [make_causal, make_encoder])
def test_a_model_without_a_tokenizer_says_why_its_quality_is_unknown(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = make(tmp_path / "speechless")
    for path in source.glob("*token*"):
        path.unlink()
    (row,) = [m for m in run(source, schemes={NF4: SCHEMES[NF4]}).heard if isinstance(m, Measured)]
    assert row.measurement.details.quality.reason == "it has no tokenizer"
    assert row.measurement.perplexity is None


@pytest.fixture
def published(source: Path) -> dict[int, Path]:
    ear = run(source)
    assert ear.measured() == {NF4, INT8}
    return places(ear, source)


def test_a_retried_job_with_a_published_checkpoint_goes_to_the_benchmark(
    source: Path, published: dict[int, Path]
) -> None:
    before = {job_id: written(folder) for job_id, folder in published.items()}
    ear = run(source, attempt=2)
    assert ear.entered(Stage.QUANTIZING) == ear.entered(Stage.PUBLISHING) == set()
    known = next(number for number, m in enumerate(ear.heard) if isinstance(m, Resolved))
    assert not any(isinstance(m, Progressed) for m in ear.heard[known:]), "nothing is read and nothing written"
    assert ear.measured() == {NF4, INT8}
    assert places(ear, source) == published
    assert {job_id: written(folder) for job_id, folder in published.items()} == before


@pytest.mark.parametrize("missing", [NF4, INT8])
def test_a_width_that_is_published_is_not_written_again(missing: int, source: Path, published: dict[int, Path]) -> None:
    there = NF4 + INT8 - missing
    before = written(published[there])
    shutil.rmtree(published[missing])
    ear = run(source, attempt=2)
    assert ear.entered(Stage.QUANTIZING) == ear.entered(Stage.PUBLISHING) == {missing}
    assert ear.measured() == {NF4, INT8}
    assert written(published[there]) == before
    assert json.loads((published[missing] / "qbatch.json").read_text())["audit"]["shared_pass"] == 1


def test_a_width_that_does_not_verify_is_written_anew_and_the_other_is_not(
    source: Path, published: dict[int, Path]
) -> None:
    before = written(published[INT8])
    weights = published[NF4] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ear = run(source, attempt=2)
    assert ear.entered(Stage.QUANTIZING) == {NF4}
    assert ear.measured() == {NF4, INT8}
    assert written(published[INT8]) == before


def test_a_width_that_cannot_be_written_leaves_the_other_alone(source: Path) -> None:
    """A file system that takes no file of the size of the int8 weights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (520_000, before[1]))
    try:
        ear = run(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ear.failed() == {INT8: StorageError.kind}
    assert ear.measured() == {NF4}
    assert places(ear, source).keys() == {NF4}
    assert not list((source.parent / "storage" / ".staging").rglob("*.safetensors"))


def test_a_library_that_this_worker_lacks_fails_the_jobs_that_need_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_installed = metadata.version

    def version(name: str) -> str:
        if name == "torchao":
            raise metadata.PackageNotFoundError(name)
        return of_installed(name)

    monkeypatch.setattr(metadata, "version", version)
    identity.writer_versions.cache_clear()
    ear = run(source, schemes={NF4: SCHEMES[NF4], TORCHAO: Scheme(method=Method.TORCHAO_INT8)})
    assert ear.failed() == {TORCHAO: Unsupported.kind}
    assert ear.measured() == {NF4}
    alone = run(source, schemes={TORCHAO: Scheme(method=Method.TORCHAO_INT8)})
    assert alone.failed() == {TORCHAO: Unsupported.kind}


def test_a_method_that_does_not_work_on_this_device_fails_alone(source: Path) -> None:
    ear = run(source, schemes={NF4: SCHEMES[NF4], TORCHAO: Scheme(method=Method.TORCHAO_INT4)})
    assert ear.failed() == {TORCHAO: Unsupported.kind}
    assert ear.measured() == {NF4}


def test_what_lies_beside_the_weights_is_refused_where_it_is_too_much(source: Path) -> None:
    with (source / "events.json").open("wb") as file:
        file.truncate(2**30 + 2**20)
    ear = run(source)
    assert ear.failed() == {NF4: Unsupported.kind, INT8: Unsupported.kind}
    said = {m.message for m in ear.heard if isinstance(m, Failed)}
    assert said.pop().startswith(
        "the files next to the weights take 1025.0 MiB, more than the 1024.0 MiB that a checkpoint may copy (the "
        "largest is events.json, 1025.0 MiB): move"
    )
    known = next(number for number, m in enumerate(ear.heard) if isinstance(m, Resolved))
    assert not any(isinstance(m, Progressed) for m in ear.heard[known:]), "no weight was read but to be hashed"


def test_room_is_judged_for_what_lies_beside_the_weights_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = source / "vocab.txt"
    beside.write_bytes(bytes(9 * 2**20))
    there, free = shutil.disk_usage(source), 2**20 * 10
    monkeypatch.setattr(shutil, "disk_usage", lambda _: there._replace(free=free))
    ear = run(source)
    (failed,) = [m for m in ear.heard if isinstance(m, Failed)]
    assert failed.kind == DiskFull.kind, "the other had room"
    assert failed.message == "the checkpoint needs 9.6 MiB, and the storage has 0.6 MiB left"
    assert failed.needed_bytes is not None
    assert failed.needed_bytes > 9 * 2**20
    assert len(places(ear, source)) == 1


def test_two_spellings_of_one_skip_list_are_one_checkpoint(source: Path) -> None:
    spellings = ("down_proj", "mlp.down_proj", r"model\.layers\..*\.down_proj", "o_proj")
    schemes = {job: Scheme(method=Method.NF4, skip_modules=(one,)) for job, one in enumerate(spellings, start=1)}
    ear = run(source, schemes=schemes)
    folders = places(ear, source)
    assert ear.measured() == {1, 2, 3, 4}
    (resolved,) = [m.jobs for m in ear.heard if isinstance(m, Resolved)]
    assert len({one.key for one in resolved.values()}) == 2
    assert len({key for one in resolved.values() for key in one.spelled_keys}) == 4
    assert folders[1] == folders[2] == folders[3] != folders[4]
    config = json.loads((folders[1] / "config.json").read_text())["quantization_config"]
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    assert config["llm_int8_skip_modules"] == ["lm_head", *names]
    loaders = json.loads((folders[1] / "qbatch.json").read_text())["audit"]["loaders"]
    assert {name: one["verdict"] for name, one in loaders.items() if one["verdict"] == "refuses"}.keys() == {
        "fsdp",
        "gguf",
    }
    (recorded, *_) = [
        m.measurement.details.audit.loaders for m in ear.heard if isinstance(m, Measured) if m.job_id == 1
    ]
    assert recorded is not None
    assert {name: one.to_json() for name, one in recorded.items()} == loaders


def test_a_skip_list_that_cannot_be_resolved_fails_its_job_alone(source: Path) -> None:
    broken = Scheme(method=Method.NF4, skip_modules=("(",))
    ear = run(source, schemes={NF4: broken, INT8: SCHEMES[INT8]})
    assert ear.failed().keys() == {NF4}
    assert ear.measured() == {INT8}


def test_a_width_that_cannot_be_published_leaves_the_other_alone(source: Path, published: dict[int, Path]) -> None:
    for folder in published.values():
        shutil.rmtree(folder)
    published[NF4].write_text("somebody's file is in its place")
    ear = run(source, attempt=2)
    assert ear.failed() == {NF4: StorageError.kind}
    assert ear.measured() == {INT8}


def test_widths_are_published_side_by_side(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the disk at the same time as the other."""
    both = threading.Barrier(len(SCHEMES), timeout=60.0)

    def sync_together(*paths: Path) -> frozenset[Refusal]:
        if len(paths) > 2:  # the files of a checkpoint, not its manifest
            both.wait()
        return filesystem.sync(*paths)

    monkeypatch.setattr(publishing, "sync", sync_together)
    ear = run(source)
    assert ear.measured() == {NF4, INT8}
    assert works(ear)[-1] == (Stage.PUBLISHING, (NF4, INT8))


def works(ear: Ear) -> list[tuple[Stage, tuple[int, ...]]]:
    """What the runner did before anything was measured, and which jobs would have been at fault if it had died."""
    stages = (Stage.QUANTIZING, Stage.PUBLISHING)
    return [(m.stage, m.job_ids) for m in ear.heard if isinstance(m, Entered) and m.stage in stages]


def test_a_width_that_is_refused_was_never_published(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(_source: Path, targets: Sequence[Target], **_: Any) -> list[Refused]:
        return [Refused(target=target, error=QuantizationError("no such kernel")) for target in targets]

    monkeypatch.setattr(quantizing, "write_checkpoints", refusing)
    ear = run(source)
    assert ear.failed() == dict.fromkeys((NF4, INT8), QuantizationError.kind)
    assert works(ear) == [(Stage.QUANTIZING, (NF4, INT8)), (Stage.QUANTIZING, (INT8,))]


def test_a_width_is_tried_at_its_own_risk(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[Stage, tuple[int, ...]]] = []
    ear, try_checkpoint = Ear(), Trial.try_checkpoint

    def noted(trial: Trial, *arguments: Any) -> str:
        tried.append(works(ear)[-1])
        return try_checkpoint(trial, *arguments)

    monkeypatch.setattr(Trial, "try_checkpoint", noted)
    run_bundle(source, SCHEMES, ear=ear)
    assert ear.measured() == {NF4, INT8}
    assert tried == [(Stage.PUBLISHING, (NF4,)), (Stage.PUBLISHING, (INT8,))]
    assert works(ear) == [
        (Stage.QUANTIZING, (NF4, INT8)),
        tried[0],
        (Stage.QUANTIZING, (INT8,)),
        tried[1],
        (Stage.PUBLISHING, (NF4, INT8)),
    ]


def test_weights_are_read_back_once_while_written_and_once_after_their_use(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart from being loaded, which maps them: publishing has the checksums from the writing."""
    read: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def counted(descriptor: int, *arguments: Any) -> Any:
            found = original(descriptor, *arguments)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path.name == "model.safetensors" and path.parent != source:
                read["published" if "checkpoints" in path.parts else "staged"] += (
                    found if isinstance(found, int) else len(found)
                )
            return found

        return counted

    for name in ("pread", "preadv"):
        monkeypatch.setattr(os, name, counting(name))
    ear = run(source)
    weights_bytes = sum((folder / "model.safetensors").stat().st_size for folder in places(ear, source).values())
    assert ear.measured() == {NF4, INT8}
    assert read == {"staged": weights_bytes, "published": weights_bytes}


def test_a_source_that_changed_by_then_fails_both(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_and_change(folder: Path, target: Path) -> None:
        copy_sidecars(folder, target)
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")

    monkeypatch.setattr(publishing, "copy_sidecars", copy_and_change)
    ear = run(source)
    assert ear.failed() == {NF4: SourceChanged.kind, INT8: SourceChanged.kind}
    assert not list((source.parent / "storage").rglob("qbatch.json"))
