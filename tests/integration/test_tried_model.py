"""The model that is tried before its checkpoint is published is the one that is measured, where that is the same."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from qbatch.core.domain import (
    BASELINE,
    Claim,
    DeviceKind,
    DType,
    JobSpec,
    Method,
    ProtocolOptions,
    Scheme,
    SourceRef,
    Stage,
)
from qbatch.core.errors import CudaOom
from qbatch.core.measured.speed_figures import PhaseTimes
from qbatch.core.search.bound import Bound
from qbatch.worker.models import load as loading
from qbatch.worker.quantizing.building.whole_model import WholeModel
from qbatch.worker.runner import loaded_models, publication, trial
from qbatch.worker.runner.bundle import Bundle
from qbatch.worker.runner.layer_searches import LayerSearches
from qbatch.worker.runner.loaded_models import LoadedModels
from qbatch.worker.runner.messages import CheckpointReady, Entered
from qbatch.worker.runner.timing_pauses import TimingPauses
from tests import tiny
from tests.bundles import TEXT_HASH, Ear, an_order, run_bundle
from tests.found import search_spec
from tests.unit.benchmark_models import QUICK

# Nothing repacks the codes of 8 bits, whatever the processor.
INT8 = Scheme(method=Method.INT8)
OTHER_INT8 = Scheme.of(Method.INT8, int8_threshold=0.0)


@pytest.fixture(autouse=True)
def a_quick_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = replace(QUICK, eval_text_sha256=TEXT_HASH, rounds=2)
    monkeypatch.setattr(ProtocolOptions, "for_device", lambda _options, _kind: protocol)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny.make_causal(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that a model is loaded from, staged ones as job and attempt."""
    names: list[str] = []
    original = loading.load

    def load(folder: Path, **options: Any) -> loading.LoadedModel:
        names.append(folder.name)
        return original(folder, **options)

    monkeypatch.setattr(loading, "load", load)
    return names


def loaded_for_turns(ear: Ear) -> list[tuple[int, ...]]:
    return [m.job_ids for m in ear.heard if isinstance(m, Entered) and m.stage is Stage.LOADING]


def load_times(ear: Ear, job_id: int) -> PhaseTimes:
    return (ear.measurements()[job_id].details.stats or {})["load_model"]


def test_what_was_tried_is_measured_and_loaded_once(source: Path, loads: list[str]) -> None:
    """All figures but times are those of the same checkpoint found published and loaded from there."""
    tried = run_bundle(source, {1: INT8})
    assert (loads, loaded_for_turns(tried)) == (["1-1"], [])
    found = run_bundle(source, {2: INT8})
    assert loaded_for_turns(found) == [(2,)]
    row, again = tried.measurements()[1], found.measurements()[2]
    assert row.load_model_s is not None
    assert (load_times(tried, 1).count, load_times(tried, 1).p50) == (1, row.load_model_s)
    assert row.perplexity == again.perplexity is not None
    assert row.details.size == again.details.size
    assert row.details.shapes == again.details.shapes
    layers = [one.details.audits.cpu_layers_on_generic_kernel for one in (row, again)]
    assert layers[0] == layers[1]
    assert (row.num_parameters, row.bits_per_param) == (again.num_parameters, again.bits_per_param)
    assert row.details.memory.max_ram == pytest.approx(again.details.memory.max_ram, rel=0.1)


def test_beside_a_baseline_what_was_tried_is_loaded_again(source: Path, loads: list[str]) -> None:
    """The baseline is measured first, and alone."""
    ear = run_bundle(source, {1: BASELINE, 2: INT8})
    assert ear.failed() == {}
    assert loaded_for_turns(ear)[:2] == [(1,), (2,)]
    assert len(loads) == 4


def test_a_baseline_is_the_first_even_if_nothing_is_compared(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first generation of a process is a long one, and shortest with it."""
    protocol = replace(QUICK, eval_text_sha256=TEXT_HASH, rounds=2, quality=False)
    monkeypatch.setattr(ProtocolOptions, "for_device", lambda _options, _kind: protocol)
    assert loaded_for_turns(run_bundle(source, {1: BASELINE, 2: INT8})) == [(1,), (2,), (1,)]


@pytest.mark.slow
def test_a_whole_model_is_built_with_nothing_held_beside_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold, write = LoadedModels.hold, WholeModel.write
    holders: list[LoadedModels] = []
    held: list[list[bool]] = []

    def note_holder(models: LoadedModels, *arguments: Any) -> None:
        holders.append(models)
        hold(models, *arguments)

    def note_held(model: WholeModel, meter: Any) -> Any:
        held.append([models.holds_any for models in holders])
        return write(model, meter)

    monkeypatch.setattr(LoadedModels, "hold", note_holder)
    monkeypatch.setattr(WholeModel, "write", note_held)
    ear = run_bundle(source, {1: INT8, 2: Scheme(method=Method.TORCHAO_INT8)})
    assert ear.failed() == {}
    assert held == [[False]], "one was held before"


def test_from_the_tried_models_first_step_on_a_fault_is_its_own(source: Path) -> None:
    ear = run_bundle(source, {1: INT8, 2: OTHER_INT8})
    entered = [m for m in ear.heard if isinstance(m, Entered)]
    after = next(number for number, m in enumerate(entered) if m.stage is Stage.BENCHMARKING)
    assert entered[after].job_ids == (1,)
    assert entered[after - 1].stage is Stage.PUBLISHING


def test_of_several_the_first_that_was_tried_is_held(source: Path, loads: list[str]) -> None:
    """In the first round the others are loaded for their turns, when it is gone, and in the second it is."""
    ear = run_bundle(source, {1: INT8, 2: OTHER_INT8})
    assert ear.failed() == {}
    assert loads[:2] == ["1-1", "2-1"]
    assert loaded_for_turns(ear) == [(2,), (1,)]
    assert load_times(ear, 1).count == 2


def test_what_leaves_no_room_to_try_another_is_unloaded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_models, "usable_bytes", lambda _device: 0)
    ear = run_bundle(source, {1: INT8, 2: OTHER_INT8})
    assert ear.failed() == {}
    assert loaded_for_turns(ear) == [(1,), (2,), (1,)]


def test_memory_that_runs_out_beside_what_is_held_charges_nobody(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, original = 0, trial.Trial._passes

    def passes(self: trial.Trial, model: Any) -> bool:
        nonlocal tried
        tried += 1
        if tried == 2:
            raise CudaOom("out of memory")
        return original(self, model)

    monkeypatch.setattr(trial.Trial, "_passes", passes)
    ear = run_bundle(source, {1: INT8, 2: OTHER_INT8})
    assert ear.failed() == {}
    assert ear.measured() == {1, 2}
    assert tried == 3, "it was tried again, alone"
    assert loaded_for_turns(ear) == [(1,), (2,), (1,)]
    assert {m.published.audit["forward"] for m in ear.heard if isinstance(m, CheckpointReady)} == {"ran"}


def test_what_a_pass_has_repacked_is_loaded_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes repacks 4-bit weights on a CPU with AVX512-BF16: it is not what is loaded from the files."""
    original = trial.Trial._passes

    def passes(self: trial.Trial, model: Any) -> bool:
        has_passed = original(self, model)
        weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
        weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        return has_passed

    monkeypatch.setattr(trial.Trial, "_passes", passes)
    assert loaded_for_turns(run_bundle(source, {1: INT8})) == [(1,)]


def test_where_another_writer_was_first_its_files_are_loaded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = publication.publish

    def publish_second(folder: Path, **options: Any) -> Any:
        other = folder.with_name("9-1")
        shutil.copytree(folder, other)
        weights = bytearray((other / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (other / "model.safetensors").write_bytes(weights)
        original(other, **options | {"files": []})
        return original(folder, **options)

    monkeypatch.setattr(publication, "publish", publish_second)
    ear = run_bundle(source, {1: INT8})
    assert ear.failed() == {}
    assert loaded_for_turns(ear) == [(1,)]


def test_what_was_measured_last_is_gone_before_a_search(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search has the device for itself."""
    held: list[int] = []
    monkeypatch.setattr(LayerSearches, "run", lambda *_: held.append(llamas()))
    before = llamas()
    spec = JobSpec(
        source=SourceRef(name=str(source), location=str(source), is_folder=True),
        scheme=INT8,
        dtype=DType.AUTO,
        device=DeviceKind.CPU,
        protocol=ProtocolOptions(eval_text_sha256=TEXT_HASH),
    )
    specs = [spec, replace(search_spec(Bound(max_kl=0.1)), source=spec.source)]
    claims = [Claim(job_id=number, attempt=1, spec=one) for number, one in enumerate(specs, start=1)]
    ear = Ear()
    Bundle(an_order(source.parent, claims), ear, TimingPauses()).run()
    assert ear.measured() == {1}
    assert held == [before]


def llamas() -> int:
    gc.collect()
    return sum(isinstance(one, LlamaForCausalLM) for one in gc.get_objects())
