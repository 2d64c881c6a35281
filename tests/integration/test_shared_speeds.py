"""Models of one shape in a batch: one is timed, and the others have its speed, their own quality, and say so.

The worker's own code runs bundle after bundle on a CPU that passes for the GPU with a UUID.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
from qbatch.core.measured.metric import TimingNoise
from qbatch.core.measured.metrics import DECODE
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.model_shape import shape_of
from qbatch.core.recovery import Recovery, RecoveryKind
from qbatch.models_db import jobs
from qbatch.models_db.batches import NewJob
from qbatch.models_db.results import find_results
from qbatch.models_db.session import Database
from qbatch.views.groups import timed_apart
from qbatch.views.noise import same_speed
from qbatch.views.results_table import ResultsScreen, results_table
from qbatch.views.speed_difference import speed_difference
from qbatch.worker.runner.bundle import Bundle
from qbatch.worker.runner.messages import (
    CheckpointVerified,
    Entered,
    Failed,
    FilesKnown,
    FilesSeen,
    Measured,
    Question,
    Reply,
    Resolved,
    RunnerMessage,
)
from qbatch.worker.runner.timing_pauses import TimingPauses
from qbatch.worker.serving.answers import Answers
from tests import incoming, tiny
from tests.bundles import TEXT_HASH, an_order
from tests.rows import a_worker, add_batch
from tests.unit.benchmark_models import QUICK

GPU = "GPU-of-this-test"
NF4, INT8 = Scheme(method=Method.NF4), Scheme(method=Method.INT8)
NO_OUTLIERS = Scheme.of(Method.INT8, int8_threshold=0.0)
OPTIONS = ProtocolOptions(eval_text_sha256=TEXT_HASH, share_speed=True)


@pytest.fixture(autouse=True)
def two_quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(options: ProtocolOptions, _kind: DeviceKind) -> Protocol:
        return replace(
            QUICK,
            eval_text_sha256=TEXT_HASH,
            rounds=2,
            share_speed=bool(options.share_speed),
            quality=options.quality is not False,
            energy=bool(options.energy),
            batch_size=options.batch_size or 1,
        )

    monkeypatch.setattr(ProtocolOptions, "for_device", quick)


@dataclass(slots=True)
class ProcesslessWorker:
    """A supervisor without processes: it claims, answers and records by the real functions."""

    database: Database
    folder: Path
    worker_id: int
    heard: list[RunnerMessage] = field(default_factory=list)
    answers: Answers | None = None
    claims: Sequence[Claim] = ()

    def work_on(self, job_ids: Sequence[int], device_uuid: str | None = GPU) -> None:
        with self.database.write() as session:
            self.claims = jobs.claim(session, job_ids, self.worker_id, 600.0)
        storage = self.folder / "storage"
        self.answers = Answers(self.database, storage, "a CPU", {claim.job_id: claim for claim in self.claims})
        claims = sorted(self.claims, key=lambda claim: claim.job_id)
        order = an_order(self.folder, claims, device_name="a CPU", device_uuid=device_uuid)
        Bundle(order, self, TimingPauses()).run()

    def ask(self, question: Question) -> Reply:
        self.send(question)
        if isinstance(question, FilesSeen):
            return FilesKnown(digests={})
        assert isinstance(question, Resolved)
        assert self.answers is not None
        return self.answers.find(question)

    def send(self, message: RunnerMessage) -> None:
        self.heard.append(message)
        assert not isinstance(message, Failed), message
        if isinstance(message, CheckpointVerified):
            assert self.answers is not None
            self.answers.verified(message)
        if isinstance(message, Measured):
            attempt = next(claim.attempt for claim in self.claims if claim.job_id == message.job_id)
            with self.database.write() as session:
                assert jobs.succeed(
                    session,
                    (message.job_id, attempt),
                    message.measurement,
                    protocol=message.protocol,
                    checkpoint_path=message.checkpoint_path,
                )

    def loads(self, job_id: int) -> int:
        return sum(isinstance(m, Entered) and m.stage is Stage.LOADING and job_id in m.job_ids for m in self.heard)


@pytest.fixture
def worker(sqlite_database: Database, tmp_path: Path) -> ProcesslessWorker:
    return ProcesslessWorker(database=sqlite_database, folder=tmp_path, worker_id=a_worker(sqlite_database))


def submit(
    worker: ProcesslessWorker,
    models: Sequence[Path],
    *schemes: Scheme,
    protocols: Sequence[ProtocolOptions] = (OPTIONS,),
) -> list[list[int]]:
    """The ids of the jobs of a batch, by model."""
    bundles = [
        [
            NewJob(
                spec=JobSpec(
                    source=SourceRef(name=str(model), location=str(model), is_folder=True),
                    scheme=scheme,
                    dtype=DType.AUTO,
                    device=DeviceKind.CPU,
                    protocol=protocol,
                ),
                bits=scheme.bits(DType.BFLOAT16),
            )
            for protocol in protocols
            for scheme in schemes
        ]
        for model in models
    ]
    with worker.database.write() as session:
        batch_id = add_batch(session, bundles)
    with worker.database.read() as session:
        ids = sorted(int(row.job_id[1:]) for row in find_results(session, batch_ids=[batch_id]))
    size = len(bundles[0])
    return [ids[n : n + size] for n in range(0, len(ids), size)]


def rows_of(worker: ProcesslessWorker, job_ids: Sequence[int]) -> list[ResultRow]:
    with worker.database.read() as session:
        found = {row.job_id: row for row in find_results(session, job_ids=job_ids)}
    return [found[f"j{job_id}"] for job_id in job_ids]


def origins(worker: ProcesslessWorker, job_ids: Sequence[int]) -> list[str | None]:
    return [row.speed_from for row in rows_of(worker, job_ids)]


def fine_tunes(folder: Path, count: int = 2) -> list[Path]:
    return [tiny.make_causal(folder / f"tune{seed}", dtype="bfloat16", seed=seed) for seed in range(count)]


def test_a_fine_tune_has_the_speed_of_the_first_and_its_own_quality(worker: ProcesslessWorker, tmp_path: Path) -> None:
    first, second, third = submit(worker, fine_tunes(tmp_path, 3), BASELINE, NF4, NO_OUTLIERS)
    for job_ids in (first, second, third):
        worker.work_on(job_ids)
    assert origins(worker, first) == [None] * 3
    assert origins(worker, second) == origins(worker, third) == [f"j{job_id}" for job_id in first]
    assert [worker.loads(job_id) for job_id in (*second, *third)] == [1] * 6, "for its quality"
    for timed, taken in zip(rows_of(worker, first), rows_of(worker, second), strict=True):
        assert taken.decode_tokens_per_s == timed.decode_tokens_per_s is not None
        assert taken.prefill_s_p50 == timed.prefill_s_p50
        assert taken.details.memory == timed.details.memory
        assert taken.details.rounds == timed.details.rounds
        assert taken.perplexity != timed.perplexity
        assert taken.perplexity is not None
        assert taken.load_model_s is not None
        assert taken.details.fingerprint != timed.details.fingerprint
        assert taken.to_json()["speed_from"] == timed.job_id
        assert timed.to_json()["speed_from"] is None


def test_with_adapters_too(worker: ProcesslessWorker, tmp_path: Path) -> None:
    """An adapter's audit counts no parameters; those of its checkpoint are what must agree."""
    adapters = [replace(NF4, recovery=Recovery.of(RecoveryKind.SVD, rank, TEXT_HASH)) for rank in (4, 8)]
    first, second = submit(worker, fine_tunes(tmp_path), BASELINE, NF4, *adapters)
    worker.work_on(first)
    worker.work_on(second)
    assert origins(worker, second) == [f"j{job_id}" for job_id in first]
    timed, taken = rows_of(worker, [first[2], second[2]])
    assert taken.decode_tokens_per_s == timed.decode_tokens_per_s is not None
    assert taken.kl_mean != timed.kl_mean


def test_what_was_timed_on_noise_says_so_in_every_row(worker: ProcesslessWorker, tmp_path: Path) -> None:
    """And why there is no quality of a model that reads no text."""
    models = [incoming.sees_or_hears(tmp_path / name, "vit") for name in ("first", "second")]
    weights = load_file(models[1] / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, models[1] / "model.safetensors", {"format": "pt"})
    first, second = submit(worker, models, BASELINE, NF4)
    worker.work_on(first)
    worker.work_on(second)
    (_, timed), (_, taken) = rows_of(worker, first), rows_of(worker, second)
    assert taken.speed_from == timed.job_id
    assert taken.details.noise_inputs == timed.details.noise_inputs == "pixel_values [1, 3, 224, 224]"
    assert taken.details.not_measured == timed.details.not_measured
    assert "pixel_values" in taken.details.not_measured["quality"]


def test_rows_with_a_known_speed_are_compared_by_the_rounds_that_it_is_of(
    worker: ProcesslessWorker, tmp_path: Path
) -> None:
    first, second = submit(worker, fine_tunes(tmp_path), BASELINE, NF4)
    worker.work_on(first)
    worker.work_on(second)
    (timed_base, timed), (base, taken) = rows_of(worker, first), rows_of(worker, second)
    assert not timed_apart(taken, base)
    assert isinstance(DECODE.noise, TimingNoise)
    assert speed_difference(DECODE.noise, taken, base, 0.0) == speed_difference(DECODE.noise, timed, timed_base, 0.0)
    assert same_speed(DECODE, taken, timed), "they are the same samples"
    text = " ".join(results_table(ResultsScreen(rows=[timed_base, timed, base, taken])).split())
    assert f"its speed and its peaks of memory are those of j{first[1]}, a model of the same shape in its batch" in text


def test_outliers_are_timed_for_every_model(worker: ProcesslessWorker, tmp_path: Path) -> None:
    first, second = submit(worker, fine_tunes(tmp_path), BASELINE, INT8, NF4)
    worker.work_on(first)
    worker.work_on(second)
    assert origins(worker, second) == [f"j{first[0]}", None, f"j{first[2]}"]
    base, int8, nf4 = rows_of(worker, second)
    assert int8.details.rounds.count == 2
    assert int8.details.rounds.interleaved_with == ()
    assert timed_apart(int8, base), "and a reader is told"
    assert not timed_apart(nf4, base)
    assert timed_apart(base, int8), "from either side"
    assert [worker.loads(job_id) for job_id in (second[0], second[2])] == [1, 1]


def test_a_speed_is_known_in_its_batch_and_on_its_gpu_only(worker: ProcesslessWorker, tmp_path: Path) -> None:
    models = fine_tunes(tmp_path, 3)
    (earlier,) = submit(worker, models[:1], BASELINE, NF4)
    worker.work_on(earlier)
    second, third = submit(worker, models[1:], BASELINE, NF4)
    worker.work_on(second)
    assert origins(worker, second) == [None, None], "another batch"
    worker.work_on(third, device_uuid="GPU-another")
    assert origins(worker, third) == [None, None], "another GPU"


@pytest.mark.parametrize(
    ("protocol", "device_uuid"),
    [
        (replace(OPTIONS, share_speed=False), GPU),
        (replace(OPTIONS, energy=True), GPU),
        (OPTIONS, None),
    ],
    ids=["--speed each", "energy", "a CPU"],
)
def test_every_model_is_timed(
    protocol: ProtocolOptions, device_uuid: str | None, worker: ProcesslessWorker, tmp_path: Path
) -> None:
    batch = submit(worker, fine_tunes(tmp_path), BASELINE, NF4, protocols=[protocol])
    for job_ids in batch:
        worker.work_on(job_ids, device_uuid)
        assert origins(worker, job_ids) == [None, None]


def test_another_shape_and_a_mixture_are_timed(worker: ProcesslessWorker, tmp_path: Path) -> None:
    models = [
        *fine_tunes(tmp_path, 1),
        tiny.make_causal(tmp_path / "wider", dtype="bfloat16", intermediate_size=320),
        tiny.make_causal(tmp_path / "mixture", "mixtral", dtype="bfloat16"),
        tiny.make_causal(tmp_path / "mixture2", "mixtral", dtype="bfloat16", seed=1),
    ]
    for job_ids in submit(worker, models, BASELINE, NF4):
        worker.work_on(job_ids)
        assert origins(worker, job_ids) == [None, None]


def test_each_shape_of_a_protocol_has_the_speed_of_its_own(worker: ProcesslessWorker, tmp_path: Path) -> None:
    protocols = [replace(OPTIONS, batch_size=batch_size) for batch_size in (1, 2)]
    first, second = submit(worker, fine_tunes(tmp_path), BASELINE, NF4, protocols=protocols)
    worker.work_on(first)
    worker.work_on(second)
    assert origins(worker, second) == [f"j{job_id}" for job_id in first]
    assert [row.details.shapes.batch_size for row in rows_of(worker, second)] == [1, 1, 2, 2]


def test_equal_headers_with_another_number_of_parameters_are_timed(worker: ProcesslessWorker, tmp_path: Path) -> None:
    """transformers ties two stored tensors if their values are equal."""
    models = []
    for name, is_tied in (("tied", True), ("apart", False)):
        model = tiny.make_causal(tmp_path / name, dtype="bfloat16", tie_word_embeddings=True)
        tensors = load_file(model / "model.safetensors")
        head = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = head.clone() if is_tied else torch.neg(head)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        models.append(model)
    assert shape_of(models[0]) == shape_of(models[1])
    first, second = submit(worker, models, BASELINE, NF4)
    worker.work_on(first)
    worker.work_on(second)
    assert origins(worker, second) == [None, None]
    assert len({row.num_parameters for row in rows_of(worker, [*first, *second])}) == 2


def test_without_its_baseline_no_row_takes_a_speed(worker: ProcesslessWorker, tmp_path: Path) -> None:
    """As after a retry of one job: its baseline's rounds are others."""
    first, second = submit(worker, fine_tunes(tmp_path), BASELINE, NF4)
    worker.work_on(first)
    worker.work_on(second[1:])
    worker.work_on(second[:1])
    assert origins(worker, second) == [None, None]


def test_speed_alone_is_taken_by_a_model_that_was_loaded(worker: ProcesslessWorker, tmp_path: Path) -> None:
    protocol = replace(OPTIONS, quality=False)
    first, second = submit(worker, fine_tunes(tmp_path), BASELINE, NF4, protocols=[protocol])
    worker.work_on(first)
    worker.work_on(second)
    assert origins(worker, second) == [f"j{job_id}" for job_id in first]
    assert [worker.loads(job_id) for job_id in second] == [1, 1]
