"""A home that qbatch 0.1.0 filled: what it measured stays what it was, and answers only where it is certain."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from qbatch.core.domain import BASELINE, Claim, DeviceKind, DType, JobSpec, Method, ProtocolOptions, Scheme, SourceRef
from qbatch.core.identity import settle
from qbatch.core.legacy_identity import legacy_folder_fingerprint, legacy_hub_fingerprint
from qbatch.core.settings import Settings
from qbatch.core.sources import parse_source
from qbatch.models_db import checkpoints, jobs, results
from qbatch.models_db.batches import NewJob
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.submit import Receipt, Submission, submit
from qbatch.worker.checkpoints.published import find_published, problems
from qbatch.worker.runner.messages import Answered, CheckpointVerified, JobIdentity, Resolved
from qbatch.worker.serving.answers import Answers
from tests.migrating import downgrade_to
from tests.rows import a_batch, a_job, a_worker, claim, measured
from tests.schemes import with_options
from tests.tiny import make_causal
from tests.unit.test_checkpoint import KEY, put, staged

TEXT = "an evaluation text"
PROTOCOL = ProtocolOptions(eval_text_sha256=hashlib.sha256(TEXT.encode()).hexdigest())
NF4 = Scheme(method=Method.NF4)
HUB = SourceRef(name="org/model", location="org/model")
COMMIT = "c" * 40
DEVICE = "a CPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class Old:
    """What 0.1.0 left of one source: the jobs of its baseline and its NF4 checkpoint, and where that lies."""

    baseline: int
    quantized: int
    place: Path


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture
def settings(tmp_path: Path, storage: Path) -> Settings:
    return Settings(home=tmp_path, storage=storage, cache=tmp_path / "cache")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_causal(tmp_path / "model", dtype="bfloat16")


def spec(source: SourceRef, scheme: Scheme) -> JobSpec:
    return JobSpec(source=source, scheme=scheme, dtype=DType.AUTO, device=DeviceKind.CPU, protocol=PROTOCOL)


def key(source: SourceRef, scheme: Scheme, fingerprint: str) -> str:
    return settle(spec(source, scheme), fingerprint=fingerprint, source=DType.BFLOAT16, device_kind=DeviceKind.CPU).key


def fill(database: Database, storage: Path, source: SourceRef, fingerprint: str, tokenizer: Path) -> Old:
    """Jobs that 0.1.0 measured, in the schema that it had, and a checkpoint in its place."""
    worker = a_worker(database, source.name)
    keys = {scheme.method: key(source, scheme, fingerprint) for scheme in (BASELINE, NF4)}
    _, ids = a_batch(
        database,
        [
            NewJob(spec=spec(source, scheme), bits=bits, checkpoint_key=keys[scheme.method])
            for scheme, bits in ((BASELINE, 16), (NF4, 4))
        ],
    )
    published = put(staged(storage), storage, tokenizer)
    protocol = PROTOCOL.for_device(DeviceKind.CPU)
    for token, path in zip(sorted(claim(database, ids, worker)), (None, published.path), strict=True):
        with database.write() as session:
            assert jobs.succeed(session, token, measured(), protocol=protocol, checkpoint_path=path)
    with database.write() as session:
        checkpoints.record(
            session, key=keys[Method.NF4], path=published.path, root_sha256=published.root_sha256,
            disk_bytes=published.disk_bytes, job_id=ids[1],
        )  # fmt: skip
    downgrade_to(database, "0002")
    return Old(baseline=ids[0], quantized=ids[1], place=storage / published.path)


def again(database: Database, settings: Settings, source: SourceRef) -> Receipt:
    grid = Grid(bits=(4,), device=DeviceKind.CPU)
    return submit(database, settings, Submission(sources=(source,), grid=grid, eval_text=TEXT))


def test_what_0_1_0_knew_by_size_and_time_is_listed_and_answers_nobody(
    database: Database, settings: Settings, storage: Path, model: Path
) -> None:
    source = parse_source(str(model))
    old = fill(database, storage, source, legacy_folder_fingerprint(model), model)
    upgrade(database)
    receipt = again(database, settings, source)
    assert (receipt.jobs, receipt.answered, receipt.outdated) == (2, 0, 2)
    with database.read() as session:
        rows = results.find_results(session, job_ids=[old.baseline, old.quantized])
        (listed,) = [one.path for one in checkpoints.all_checkpoints(session)]
    assert [row.disk_bytes for row in rows] == [10, 10]
    assert rows[1].baseline_job_id == rows[0].job_id, "they may stand side by side"
    assert storage / listed == old.place
    assert problems(old.place) == []


def identities(database: Database, *job_ids: int, legacy: str | None) -> Resolved:
    protocol = PROTOCOL.for_device(DeviceKind.CPU).hash
    schemes = {job_id: Scheme.from_json(a_job(database, job_id).scheme) for job_id in job_ids}
    return Resolved(
        jobs={
            job_id: JobIdentity(
                key=key(HUB, scheme, "sha256:new"),
                legacy_key=key(HUB, scheme, legacy) if legacy is not None else None,
                protocol_hash=protocol,
            )
            for job_id, scheme in schemes.items()
        }
    )


@pytest.fixture
def hub(database: Database, storage: Path, model: Path) -> Old:
    """What it left of a model on the hub, upgraded."""
    old = fill(database, storage, HUB, legacy_hub_fingerprint(COMMIT, None), model)
    upgrade(database)
    return old


def claimed(database: Database, storage: Path, *schemes: Scheme) -> tuple[Answers, list[int]]:
    worker = a_worker(database, "new")
    new = [NewJob(spec=spec(HUB, scheme), bits=scheme.bits(DType.BFLOAT16)) for scheme in schemes]
    _, ids = a_batch(database, new)
    tokens = claim(database, ids, worker)
    claims = {
        job_id: Claim(job_id=job_id, attempt=attempt, spec=job.spec, time_limit_s=None)
        for (job_id, attempt), job in zip(sorted(tokens), new, strict=True)
    }
    return Answers(database, storage, DEVICE, claims), sorted(claims)


def test_a_hubs_model_whose_files_are_the_hubs_keeps_its_answers(database: Database, storage: Path, hub: Old) -> None:
    answers, ids = claimed(database, storage, BASELINE, NF4)
    asked = identities(database, *ids, legacy=f"hub:{COMMIT}")
    path = str(hub.place.relative_to(storage))
    first = answers.find(asked)
    assert (first.job_ids, list(first.unverified)) == (frozenset(), [path]), "nobody has read it since"
    verified = find_published(storage, path, KEY)
    assert verified is not None
    answers.verified(CheckpointVerified(published=verified.confirm()))
    assert answers.find(asked).job_ids == frozenset(ids)
    assert [a_job(database, job_id).reused_from for job_id in ids] == [hub.baseline, hub.quantized]


def test_files_that_are_not_certainly_the_hubs_answer_nobody(database: Database, storage: Path, hub: Old) -> None:
    answers, ids = claimed(database, storage, BASELINE, NF4)
    assert answers.find(identities(database, *ids, legacy=None)) == Answered(job_ids=frozenset())


def test_old_answers_are_no_part_of_a_bundle_that_is_measured_now(database: Database, storage: Path, hub: Old) -> None:
    answers, ids = claimed(database, storage, BASELINE, NF4, with_options(NF4, double_quant=True))
    assert answers.find(identities(database, *ids, legacy=f"hub:{COMMIT}")) == Answered(job_ids=frozenset())


def test_old_answers_of_which_one_is_gone_answer_nobody(database: Database, storage: Path, hub: Old) -> None:
    (hub.place / "model.safetensors").unlink()
    answers, ids = claimed(database, storage, BASELINE, NF4)
    assert answers.find(identities(database, *ids, legacy=f"hub:{COMMIT}")) == Answered(job_ids=frozenset())
