"""A bundle's rows are measured in rounds: in turns, each model written and judged once, for all of its shapes."""

from __future__ import annotations

import gc
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

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
    Protocol,
    ProtocolOptions,
    Scheme,
    SourceRef,
    Stage,
)
from qbatch.core.errors import BenchmarkError, CudaOom, DeviceError, HostOom, JobError, StorageError
from qbatch.worker.measuring import model_benchmark
from qbatch.worker.measuring.model_benchmark import ModelBenchmark
from qbatch.worker.measuring.pooled_rounds import pool
from qbatch.worker.measuring.row_benchmark import RowBenchmark
from qbatch.worker.measuring.speed import generation as timed_generation
from qbatch.worker.measuring.speed.phases import Round
from qbatch.worker.measuring.why.capture import Captures
from qbatch.worker.measuring.why.decode_kernels import KernelsRequest, Shape, StepKernels
from qbatch.worker.measuring.why.explain import Explanation
from qbatch.worker.models import load as loading
from qbatch.worker.runner import loaded_models, process
from qbatch.worker.runner.bundle import Bundle
from qbatch.worker.runner.loaded_models import Footprint, LoadedModels, fit_together
from qbatch.worker.runner.messages import (
    Answered,
    CheckpointReady,
    Ended,
    Entered,
    Failed,
    FilesKnown,
    FilesSeen,
    Measured,
    Order,
    Question,
    Reply,
    RunnerMessage,
)
from qbatch.worker.runner.timing_pauses import TimingPauses
from tests import tiny
from tests.bundles import TEXT_HASH, an_order
from tests.unit.benchmark_models import QUICK

SCHEMES = (BASELINE, Scheme(method=Method.INT8), Scheme(method=Method.NF4))


@dataclass(slots=True)
class RoundsEar:
    """A supervisor that only listens."""

    heard: list[RunnerMessage] = field(default_factory=list)
    answered: frozenset[int] = frozenset()

    def send(self, message: RunnerMessage) -> None:
        self.heard.append(message)

    def ask(self, question: Question) -> Reply:
        self.send(question)
        return FilesKnown(digests={}) if isinstance(question, FilesSeen) else Answered(job_ids=self.answered)

    def entered(self, stage: Stage) -> list[tuple[int, ...]]:
        return [m.job_ids for m in self.heard if isinstance(m, Entered) and m.stage is stage]

    def measured(self) -> dict[int, Measured]:
        return {m.job_id: m for m in self.heard if isinstance(m, Measured)}

    def failed(self) -> dict[int, str]:
        return {m.job_id: m.kind for m in self.heard if isinstance(m, Failed)}


def quick(options: ProtocolOptions, _kind: DeviceKind) -> Protocol:
    """Two rounds of one iteration each."""
    return replace(QUICK, eval_text_sha256=TEXT_HASH, rounds=2, batch_size=options.batch_size or 1)


def in_three_rounds(options: ProtocolOptions, kind: DeviceKind) -> Protocol:
    return replace(quick(options, kind), rounds=3)


@pytest.fixture(scope="module", autouse=True)
def a_quick_protocol() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProtocolOptions, "for_device", quick)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints of every scheme are published already."""
    folder = tmp_path_factory.mktemp("home")
    assert run(folder).failed() == {}
    return folder


def order(folder: Path, source: Path, *batch_sizes: int, schemes: tuple[Scheme, ...] = SCHEMES) -> Order:
    """Jobs j1, j2, … of ``source``, as a worker claims them: the baseline's first, at every shape."""
    jobs = [(scheme, batch_size) for scheme in schemes for batch_size in batch_sizes or (1,)]
    claims = tuple(
        Claim(
            job_id=number,
            attempt=1,
            spec=JobSpec(
                source=SourceRef(name=str(source), location=str(source), is_folder=True),
                scheme=scheme,
                dtype=DType.AUTO,
                device=DeviceKind.CPU,
                protocol=ProtocolOptions(eval_text_sha256=TEXT_HASH, batch_size=batch_size),
            ),
        )
        for number, (scheme, batch_size) in enumerate(jobs, start=1)
    )
    return an_order(folder, claims)


def run(folder: Path, *batch_sizes: int, answered: frozenset[int] = frozenset(), **options: Any) -> RoundsEar:
    source = folder / "llama"
    if not source.exists():
        tiny.make_causal(source)
    ear = RoundsEar(answered=answered)
    Bundle(order(folder, source, *batch_sizes, **options), ear, TimingPauses()).run()
    return ear


@pytest.mark.slow
def test_each_model_has_its_turn_in_every_round(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory does not hold all of them, each is loaded for its turn."""
    monkeypatch.setattr(loaded_models, "usable_bytes", lambda _device: 0)
    monkeypatch.setattr(ProtocolOptions, "for_device", in_three_rounds)
    ear = run(home)
    turns = [(1,), (2,), (3,), (2,), (1,), (2,), (3,)]
    assert ear.entered(Stage.LOADING) == turns, "there and back and there"
    assert ear.entered(Stage.BENCHMARKING) == turns
    assert list(ear.measured()) == [1, 2, 3]
    for job_id, done in ear.measured().items():
        details = done.measurement.details.to_json()
        assert details["stats"]["prefill"]["count"] == details["rounds"]["count"] == 3
        assert details["stats"]["load_model"]["count"] == (3 if job_id == 2 else 2)
        assert details["rounds"]["interleaved_with"] == [f"j{other}" for other in (1, 2, 3) if other != job_id]
        assert len(details["rounds"]["phases"]["per_token"]["p50"]) == 3
        assert details["flags"] is None, "there is no GPU to be shared"


@pytest.mark.slow
def test_the_first_generation_of_a_bundle_warms_up_for_all_its_models(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed = {"warmup_iterations": 1, "warmup_tokens": 2, "full_first_warmup": True, "rounds": 2}
    monkeypatch.setattr(ProtocolOptions, "for_device", lambda *of: replace(quick(*of), **warmed))
    generated, generate = list[tuple[int, int]](), timed_generation._steps_s

    def noted(model: Any, prompts: Any, new_tokens: int, clock: Any) -> Any:
        generated.append((len(prompts), new_tokens))
        return generate(model, prompts, new_tokens, clock)

    monkeypatch.setattr(timed_generation, "_steps_s", noted)
    assert run(home, 1, 2, schemes=SCHEMES[:2]).failed() == {}
    turn = [(1, 2), (1, 4), (2, 2), (2, 4)]
    assert generated == [(1, 4), (1, 4), (2, 4), (2, 4), *turn, *turn, *turn]


@pytest.mark.slow
def test_a_baseline_reads_the_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its perplexity is that of the outputs with which the others are compared."""
    monkeypatch.setattr(model_benchmark, "score_text", lambda *_: pytest.fail("the text was read again"))
    done = run(tmp_path, schemes=SCHEMES[:2]).measured()
    quality = done[2].measurement.details.to_json()["quality"]
    assert done[1].measurement.perplexity == pytest.approx(quality["base_perplexity"], rel=1e-6)


@pytest.mark.slow
def test_models_that_fit_together_are_loaded_alone_once_and_then_stay(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProtocolOptions, "for_device", lambda *of: replace(quick(*of), rounds=3))
    ear = run(home)
    assert ear.entered(Stage.LOADING) == [(1,), (2,), (3,), (2,), (1,)], (
        "the third was loaded at the end of the first round"
    )
    assert ear.entered(Stage.BENCHMARKING) == [(1,), (2,), (3,), (2,), (1,), (2,), (3,)]
    assert list(ear.measured()) == [1, 2, 3]
    for job_id, loads in ((1, 2), (2, 2), (3, 1)):
        details = ear.measured()[job_id].measurement.details.to_json()
        assert details["stats"]["load_model"]["count"] == loads, "each load that there was"
        assert details["rounds"]["interleaved_with"] == [f"j{other}" for other in (1, 2, 3) if other != job_id]
        assert details["rounds"]["count"] == 3


@pytest.mark.slow
def test_the_first_round_has_one_model_loaded_and_the_others_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of memory are those of one model alone."""
    held: list[int] = []
    original = RowBenchmark.time

    def time(row: RowBenchmark, loaded: Any) -> None:
        held.append(llamas())
        original(row, loaded)

    before = llamas()
    monkeypatch.setattr(RowBenchmark, "time", time)
    run(home)
    assert [number - before for number in held] == [1, 1, 1, 1, 2, 3]


@pytest.mark.parametrize("error", [CudaOom("out of memory"), HostOom("cannot allocate memory")], ids=["GPU", "host"])
@pytest.mark.parametrize(("at", "again"), [(4, [3, 2, 1]), (5, [2, 1]), (6, [1])])
def test_memory_that_runs_out_with_several_models_charges_nobody(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: JobError, at: int, again: list[int]
) -> None:
    """From then on they are loaded one at a time, and every row has all of its rounds."""
    timed = fail_once(monkeypatch, error, at=at)
    ear = run(home)
    assert ear.failed() == {}
    assert timed() == 7, "the one that failed was timed again"
    assert ear.entered(Stage.LOADING)[-len(again) :] == [(job_id,) for job_id in again]
    assert ear.entered(Stage.BENCHMARKING)[-len(again) :] == [(job_id,) for job_id in again]
    for done in ear.measured().values():
        assert done.measurement.details.rounds.count == 2


def test_an_analysis_that_needs_the_device_alone_has_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If memory runs out then too, only the analysis is missing."""
    observe = RowBenchmark.observe
    asking_why(monkeypatch)
    monkeypatch.setattr(RowBenchmark, "observe", observe)
    before, held = llamas(), list[int]()

    def work(*_: Any) -> None:
        held.append(llamas() - before)
        if len(held) in (2, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qbatch.worker.measuring.why.explain._work", work)
    ear = run(home)
    assert held == [1, 2, 1, 1], "the second of three was analyzed again"
    assert ear.failed() == {}
    assert ear.measured().keys() == {1, 2, 3}


def test_memory_that_runs_out_with_one_model_is_that_job_s_failure(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after several were loaded together: once it is alone, it is at fault."""
    timed, original = 0, RowBenchmark.time

    def time(row: RowBenchmark, loaded: Any) -> None:
        nonlocal timed
        timed += 1
        if timed in (5, 6):
            raise CudaOom("out of memory")
        original(row, loaded)

    monkeypatch.setattr(RowBenchmark, "time", time)
    ear = run(home)
    assert ear.failed() == {2: "cuda_oom"}
    assert ear.measured().keys() == {3}, "whose last round was over"


def runner_short_of_memory(connection: Connection) -> None:
    """A runner's whole life, in which memory runs out in the second round."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ProtocolOptions, "for_device", quick)
    fail_once(patch, CudaOom("out of memory"), at=5)
    process.run(connection)


@pytest.mark.slow
def test_in_a_runner_of_its_own_running_out_of_memory_charges_nobody(home: Path) -> None:
    """Nothing fails, so nothing is learnt of what a job needs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    the_order = replace(order(home, home / "llama"), log_path=home / "runner.log")
    runner = context.Process(target=runner_short_of_memory, args=(theirs,))
    runner.start()
    theirs.close()
    ours.send(the_order)
    ear = RoundsEar()
    while not isinstance(message := ours.recv(), Ended):
        if isinstance(message, Question):
            ours.send(ear.ask(message))
        else:
            ear.send(message)
    ours.close()
    runner.join(60)
    assert runner.exitcode == 0
    assert ear.failed() == {}
    assert ear.measured().keys() == {1, 2, 3}
    assert "memory ran out with several models loaded (out of memory)" in (home / "runner.log").read_text()


def footprint(held: int, working: int) -> Footprint:
    return Footprint(held_bytes=held, working_bytes=working)


def test_models_fit_together_if_any_one_can_be_measured_beside_the_others() -> None:
    models = [footprint(16, 4), footprint(9, 6), footprint(6, 1)]
    assert fit_together(models, 37)
    assert not fit_together(models, 36)


@pytest.mark.parametrize(("usable", "together"), [(19, False), (20, True)])
def test_what_is_loaded_already_counts_as_room(monkeypatch: pytest.MonkeyPatch, usable: int, together: bool) -> None:
    """16 and 9 held, and 6 to work: of these 16, 5 are not to be found any more, since the second model is loaded."""
    used = iter([100, 116, 100, 109])
    monkeypatch.setattr(loaded_models, "used_bytes", lambda _device: next(used))
    monkeypatch.setattr(loaded_models, "usable_bytes", lambda _device: usable + 2)
    models = LoadedModels("cpu")
    for jobs, peak in (((1,), 120), ((2, 3), 115)):
        models.add(jobs, lambda: None)  # type: ignore[arg-type,return-value]
        models.note_peak(jobs, weights_bytes=8, peak_bytes=peak)
    models.keep_together([(1,), (2, 3)])
    assert models.are_together == together


def test_a_model_that_was_not_measured_alone_is_kept_with_no_other() -> None:
    models = LoadedModels("cpu")
    models.add((1,), lambda: None)  # type: ignore[arg-type,return-value]
    models.note_peak((1,), weights_bytes=1, peak_bytes=1)
    models.keep_together([(1,), (2,)])
    assert not models.are_together


def test_a_job_that_is_alone_has_its_rounds_in_a_row_and_says_so(home: Path) -> None:
    ear = run(home, schemes=(BASELINE,))
    assert ear.entered(Stage.LOADING) == [(1,)], "nothing takes its place, so it is not loaded again"
    measurement = ear.measured()[1].measurement
    rounds, loading = measurement.details.to_json()["rounds"], measurement.details.to_json()["stats"]["load_model"]
    assert (rounds["count"], rounds["interleaved_with"]) == (2, [])
    assert (loading["count"], loading["p99"]) == (1, measurement.load_model_s)


@pytest.mark.slow
def test_shapes_share_a_checkpoint_its_loading_and_its_quality(tmp_path: Path) -> None:
    ear = run(tmp_path, 1, 3)
    assert ear.entered(Stage.LOADING) == [(1, 2), (3, 4), (5, 6), (3, 4), (1, 2)]
    assert ear.entered(Stage.QUANTIZING)[0] == (3, 4, 5, 6)
    assert ear.entered(Stage.PUBLISHING) == [(3, 4), (5, 6), (3, 4, 5, 6)], "each tried alone, then side by side"
    ready = [m for m in ear.heard if isinstance(m, CheckpointReady)]
    assert [m.job_id for m in ready] == [3, 4, 5, 6, 5, 6, 3, 4], "published, and confirmed once it was measured"
    assert all(all(m.published.versions.values()) for m in ready[4:]), "by then its files' times can be trusted"
    done = ear.measured()
    assert done.keys() == {1, 2, 3, 4, 5, 6}
    for one, three in ((1, 2), (3, 4), (5, 6)):
        first, second = done[one].measurement, done[three].measurement
        assert done[one].checkpoint_path == done[three].checkpoint_path
        assert (first.perplexity, first.kl_mean) == (second.perplexity, second.kl_mean)
        assert first.details.to_json()["quality"] == second.details.to_json()["quality"]
        assert [m.details.to_json()["shapes"]["batch_size"] for m in (first, second)] == [1, 3]
        loads = [m.details.to_json()["stats"]["load_model"]["count"] for m in (first, second)]
        assert loads == ([1, 1] if one == 5 else [2, 2])
        assert first.details.to_json()["protocol_hash"] != second.details.to_json()["protocol_hash"]
    kl = [done[job_id].measurement.kl_mean for job_id in (3, 5)]
    assert kl[0] is not None
    assert kl[1] is not None
    assert 0 < kl[0] < kl[1]
    assert len(list((tmp_path / "storage" / "base-logits").iterdir())) == 1
    assert len(list((tmp_path / "storage" / "checkpoints" / "llama").iterdir())) == 2


def test_what_is_answered_is_not_measured_and_the_reference_is_still_there(home: Path) -> None:
    ear = run(home, answered=frozenset({1, 2}))
    assert ear.entered(Stage.QUANTIZING) == []
    (done,) = ear.measured().values()
    assert done.job_id == 3
    assert done.measurement.kl_mean is not None
    assert done.measurement.details.to_json()["rounds"]["interleaved_with"] == []


def test_without_the_bases_outputs_a_reason_replaces_the_comparison(home: Path) -> None:
    shutil.rmtree(home / "storage" / "base-logits")
    (done,) = run(home, answered=frozenset({1, 2})).measured().values()
    assert done.measurement.kl_mean is None
    assert done.measurement.perplexity is not None
    assert "--force" in done.measurement.details.to_json()["quality"]["reason"]


@pytest.mark.parametrize(("kept", "said"), [(StorageError("no room"), "stored: no room"), (None, "nothing to compare")])
def test_outputs_that_could_not_be_kept_leave_their_reason(
    home: Path, monkeypatch: pytest.MonkeyPatch, kept: StorageError | None, said: str
) -> None:
    def prepare(*_: Any, **__: Any) -> None:
        if kept is not None:
            raise kept

    shutil.rmtree(home / "storage" / "base-logits", ignore_errors=True)
    monkeypatch.setattr("qbatch.worker.measuring.quality.reference.prepare_reference", prepare)
    done = run(home).measured()
    assert all(said in done[job_id].measurement.details.to_json()["quality"]["reason"] for job_id in (2, 3))


def fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception, *, at: int) -> Callable[[], int]:
    """The ``at``-th timing of a row, counted over all rows, fails with ``error``; how many were tried."""
    timed, original = 0, RowBenchmark.time

    def time(row: RowBenchmark, loaded: Any) -> None:
        nonlocal timed
        timed += 1
        if timed == at:
            raise error
        original(row, loaded)

    monkeypatch.setattr(RowBenchmark, "time", time)
    return lambda: timed


def test_a_row_that_fails_takes_no_other_with_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, BenchmarkError("this one"), at=4)
    ear = run(home, 1, 3)
    assert ear.failed() == {}
    measured = ear.measured()
    assert measured.keys() == {1, 2, 3, 4, 5, 6}
    notes = {job_id: row.measurement.details.not_measured for job_id, row in measured.items()}
    assert {job_id: note for job_id, note in notes.items() if note} == {4: {"speed": "this one"}}


def test_a_baseline_that_fails_takes_no_other_with_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, BenchmarkError("this one"), at=1)
    ear = run(home)
    assert ear.failed() == {1: "benchmark_error"}
    assert ear.measured().keys() == {2, 3}


def test_after_a_device_fault_the_open_jobs_are_left_to_another_runner(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is that of one job; what was published stands, so trying again costs the measuring alone."""
    fail_once(monkeypatch, DeviceError("illegal memory access"), at=5)
    ear = run(home)
    assert ear.failed() == {2: "device_error"}
    assert ear.measured().keys() == {3}, "whose last round was over"


@pytest.mark.parametrize(("at", "failed"), [(1, 1), (5, 3)], ids=["first round", "last round"])
def test_after_a_shape_that_the_memory_cannot_hold_no_other_is_timed(
    home: Path, monkeypatch: pytest.MonkeyPatch, at: int, failed: int
) -> None:
    """Nobody waits for them here: they are left to another runner."""
    monkeypatch.setattr(loaded_models, "usable_bytes", lambda _device: 0)
    timed = fail_once(monkeypatch, CudaOom("out of memory"), at=at)
    ear = run(home, 1, 2, schemes=(BASELINE, SCHEMES[1]))
    assert ear.failed() == {failed: "cuda_oom"}
    assert ear.measured() == {}
    assert timed() == at


@pytest.mark.parametrize("why", [False, True], ids=["quality first", "quality last"])
def test_a_fault_while_explaining_costs_the_explanation_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, why: bool
) -> None:
    """The row is sent, and the rest of the bundle goes to another runner."""
    monkeypatch.setattr(ProtocolOptions, "for_device", lambda *of: replace(quick(*of), why=why))
    monkeypatch.setattr(RowBenchmark, "fault", property(lambda row: DeviceError("gone") if row.rounds == 2 else None))
    ear = run(home)
    assert ear.measured().keys() == {3}, "the first whose last round was over"
    assert ear.failed() == {}


def test_a_fault_while_explaining_a_second_shape_charges_nobody(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is complete, and must not be captured on a device that is unusable: not even memory can be freed."""
    asking_why(monkeypatch)
    broken: list[int] = []

    def observe(row: RowBenchmark, _loaded: Any, **_: Any) -> None:
        row._why = Explanation(row._protocol, lambda _step: None)
        if row._protocol.batch_size == 2:
            row._why.fault = DeviceError("gone")
            broken.append(row._protocol.batch_size)

    def free() -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    shape = Shape(batch_size=1, prompt_tokens=16, new_tokens=4)
    captured = property(lambda row: shape if row.rounds == 2 and row.fault is None else None)
    monkeypatch.setattr(RowBenchmark, "observe", observe)
    monkeypatch.setattr(RowBenchmark, "captured_shape", captured)
    monkeypatch.setattr(loaded_models, "free_device_memory", free)
    ear = run(home, 1, 2, schemes=(BASELINE,))
    assert ear.failed() == {}
    assert ear.measured().keys() == {1, 2}
    assert [done.measurement.details.why.reason for done in ear.measured().values()] == ["gone", "gone"]
    assert all(done.measurement.details.incomplete for done in ear.measured().values())


@pytest.mark.parametrize("may_pass", [True, False])
def test_what_was_measured_before_a_load_failed_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch, may_pass: bool
) -> None:
    monkeypatch.setattr(loaded_models, "usable_bytes", lambda _device: 0)
    loads, original = list[str](), loading.load

    def load(folder: Path, **options: Any) -> Any:
        loads.append(folder.name)
        if loads.count(folder.name) == 2 and folder.name.startswith("bnb-int8"):
            error = BenchmarkError("cannot load it: stale file handle")
            error.may_pass = may_pass
            raise error
        return original(folder, **options)

    monkeypatch.setattr(loading, "load", load)
    ear = run(home)
    assert ear.failed() == {}
    int8 = ear.measured()[2].measurement
    assert int8.details.not_measured == {"speed": "cannot load it: stale file handle"}
    assert [bool(done.measurement.details.incomplete) for done in ear.measured().values()] == [False, may_pass, False]
    assert int8.kl_mean is not None
    assert int8.decode_tokens_per_s is None


@pytest.mark.parametrize("why", [False, True], ids=["quality first", "quality last"])
def test_a_fault_after_the_quality_was_measured_leaves_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, why: bool
) -> None:
    def fault(row: RowBenchmark) -> DeviceError | None:
        is_baseline = row.model.subject.folder.name == "llama"
        return DeviceError("gone") if is_baseline and row.rounds == 2 else None

    monkeypatch.setattr(ProtocolOptions, "for_device", lambda *of: replace(quick(*of), why=why))
    monkeypatch.setattr(RowBenchmark, "fault", property(fault))
    ear = run(home)
    assert ear.failed() == {}
    baseline = ear.measured()[1].measurement
    assert baseline.perplexity is not None
    assert "quality" not in (baseline.details.not_measured or {})


class HeardCaptures(Captures):
    """Captures that tell what is asked of them, and whether any model was loaded then. Without a GPU none is made."""

    heard: ClassVar[list[tuple[int, int]]] = []

    prepared: ClassVar[list[list[str]]] = []

    def prepare(self, requests: Sequence[KernelsRequest]) -> None:
        self.prepared.append([Path(request.folder).name for request in requests])

    def release(self) -> None:
        self.prepared.append([])

    def kernels(self, requests: Sequence[KernelsRequest]) -> list[list[StepKernels]]:
        self.heard.append((len(requests), llamas()))
        return [[StepKernels(reason="no GPU")] * len(request.shapes) for request in requests]


def llamas() -> int:
    gc.collect()
    return sum(isinstance(one, LlamaForCausalLM) for one in gc.get_objects())


@pytest.mark.parametrize(
    ("usable", "asked"),
    [(None, [(3, 0)]), (0, [(1, 0)] * 3)],
    ids=["loaded together", "one at a time"],
)
def test_kernels_are_measured_when_no_model_is_loaded_here(
    home: Path, monkeypatch: pytest.MonkeyPatch, usable: int | None, asked: list[tuple[int, int]]
) -> None:
    """All in one process if the models fit together."""
    before = llamas()
    asking_why(monkeypatch)
    if usable is not None:
        monkeypatch.setattr(loaded_models, "usable_bytes", lambda _device: usable)
    ear = run(home)
    assert ear.measured().keys() == {1, 2, 3}
    assert [(count, held - before) for count, held in HeardCaptures.heard] == asked


def plenty(_models: LoadedModels) -> bool:
    return True


def asking_why(monkeypatch: pytest.MonkeyPatch, room: Callable[[LoadedModels], bool] = plenty) -> None:
    """As on a GPU, but that nothing is captured. ``room``: whether another process can load the same models."""
    shape = Shape(batch_size=1, prompt_tokens=16, new_tokens=4)
    monkeypatch.setattr("qbatch.worker.measuring.why.capture.Captures", HeardCaptures)
    monkeypatch.setattr(RowBenchmark, "captured_shape", property(lambda row: shape if row.rounds == 2 else None))
    always = property(lambda _: True, lambda *_: None)
    monkeypatch.setattr(ModelBenchmark, "is_explainable", always, raising=False)
    monkeypatch.setattr(ProtocolOptions, "for_device", lambda *of: replace(quick(*of), why=True))
    monkeypatch.setattr(RowBenchmark, "observe", lambda _row, _loaded, **_: None)
    monkeypatch.setattr(LoadedModels, "have_room_for_copies", room)
    HeardCaptures.heard.clear()
    HeardCaptures.prepared.clear()


def judged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Whenever the quality of a model is measured: how many rows were timed by then, and how many models are loaded."""
    found: list[tuple[int, int]] = []
    timed, measure = fail_once(monkeypatch, BenchmarkError(""), at=-1), ModelBenchmark.measure_quality
    before = llamas()

    def measure_quality(*arguments: Any, **options: Any) -> None:
        found.append((timed(), llamas() - before))
        measure(*arguments, **options)

    monkeypatch.setattr(ModelBenchmark, "measure_quality", measure_quality)
    return found


@pytest.mark.slow
def test_where_two_of_each_model_fit_quality_is_measured_while_others_load(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last round: what another process takes must not count in the memory of models that are timed alone."""
    asking_why(monkeypatch)
    found = judged(monkeypatch)
    ear = run(home)
    assert found == [(1, 1), (6, 3), (6, 3)], "the baseline's outputs are kept at once"
    assert [len(folders) for folders in HeardCaptures.prepared] == [3, 0], "and released at the end"
    assert HeardCaptures.prepared[0][0] == "llama"
    assert [done.measurement.kl_mean is None for done in ear.measured().values()] == [True, False, False]


def no_room(_models: LoadedModels) -> bool:
    return False


def unusable(_models: LoadedModels) -> bool:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.slow
@pytest.mark.parametrize("room", [no_room, unusable])
def test_without_memory_for_copies_nothing_is_loaded_ahead(
    home: Path, monkeypatch: pytest.MonkeyPatch, room: Callable[[LoadedModels], bool]
) -> None:
    asking_why(monkeypatch, room)
    found = judged(monkeypatch)
    assert run(home).measured().keys() == {1, 2, 3}
    assert found == [(1, 1), (6, 3), (6, 3)]
    assert HeardCaptures.prepared == [[]]


@pytest.mark.slow
def test_models_that_are_loaded_in_turns_are_judged_in_their_last(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none is loaded once more for that."""
    asking_why(monkeypatch)
    monkeypatch.setattr(loaded_models, "usable_bytes", lambda _device: 0)
    found = judged(monkeypatch)
    ear = run(home)
    assert found == [(1, 1), (4, 1), (5, 1)]
    assert ear.entered(Stage.LOADING) == [(1,), (2,), (3,), (2,), (1,)]
    assert all(ear.measured()[job_id].measurement.kl_mean is not None for job_id in (2, 3))


@pytest.mark.parametrize(("free", "fits"), [(50, True), (49, False)])
def test_there_is_room_for_copies_beside_what_measuring_takes(
    monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    """16 and 9 held by each process, 6 to work, and 19 for the other process itself."""
    used = iter([100, 116, 100, 109])
    monkeypatch.setattr(loaded_models, "used_bytes", lambda _device: next(used))
    monkeypatch.setattr(loaded_models, "usable_bytes", lambda _device: free)
    monkeypatch.setattr(loaded_models, "_PROCESS_BYTES", 19)
    models = LoadedModels("cpu")
    for jobs, peak_bytes in (((1,), 120), ((2,), 115)):
        models.are_together = True
        models.add(jobs, lambda: None)  # type: ignore[arg-type, return-value]
        models.note_peak(jobs, weights_bytes=0, peak_bytes=peak_bytes)
    assert models.have_room_for_copies() is fits


@pytest.mark.slow
def test_memory_that_runs_out_during_quality_is_freed_and_charges_nobody(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it cost the comparison that would have been made with the memory."""
    asking_why(monkeypatch)
    original, held, before = model_benchmark.compare, list[int](), llamas()

    def short_of_memory(*arguments: Any, **options: Any) -> Any:
        held.append(llamas() - before)
        if len(held) == 1:
            raise CudaOom("out of memory")
        return original(*arguments, **options)

    monkeypatch.setattr(model_benchmark, "compare", short_of_memory)
    ear = run(home)
    assert ear.failed() == {}
    assert held == [3, 1, 1]
    assert [len(folders) for folders in HeardCaptures.prepared[:2]] == [3, 0]
    assert all(ear.measured()[job_id].measurement.kl_mean is not None for job_id in (2, 3))


def a_round(**times_s: list[float]) -> Round:
    return Round(times_s=times_s, prompts=torch.ones(2, 8, dtype=torch.long), new_tokens=3, conditions=None)


def generation(prefill: list[float], per_token: list[list[float]]) -> Round:
    steps = [step for steps in per_token for step in steps]
    return a_round(prefill=prefill, decode=[sum(steps) for steps in per_token], per_token=steps)


def test_the_times_of_all_rounds_count_and_their_spread_is_told() -> None:
    rounds = [
        generation([1.0, 3.0], [[0.1, 0.1], [0.1, 0.1]]),
        generation([2.0, 2.0], [[0.2, 0.2], [0.2, 0.2]]),
        generation([2.0, 4.0], [[0.1, 0.2], [0.1, 0.2]]),
    ]
    speed = pool(rounds)
    assert speed.stats["prefill"].count == 6
    assert speed.stats["per_token"].count == 12
    assert speed.stats["prefill"].tokens_per_s == pytest.approx(2 * 8 / (14 / 6))
    assert speed.decode_tokens_per_s == pytest.approx(2 * 2 / ((0.2 + 0.4 + 0.3) / 3))
    assert speed.per_token_s_p50 == pytest.approx(0.15)
    assert speed.by_round["prefill"].to_json() == {"p50": [2.0, 2.0, 3.0], "mean": [2.0, 2.0, 3.0], "spread": 0.5}
    assert speed.by_round["per_token"].spread == pytest.approx(0.1 / 0.15)
    assert speed.notable_spread == pytest.approx(0.1 / 0.15)


def test_a_small_spread_is_not_worth_a_word_and_one_round_has_none() -> None:
    rounds = [a_round(forward=[1.0, 1.0]), a_round(forward=[1.1])]
    assert pool(rounds).notable_spread is None
    assert pool(rounds).by_round["forward"].spread == pytest.approx(0.1 / 1.05)
    assert pool(rounds).forward_s_p50 == 1.0
    assert pool(rounds).forward_samples_per_s == pytest.approx(2 / (3.1 / 3))
    assert pool(rounds).decode_tokens_per_s is None
    assert pool(rounds[:1]).by_round["forward"].spread is None
