"""Adapters in the database and on the storage: what needs them, what they need, and that they go in the right order."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qbatch.core.adapter_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qbatch.core.domain import DeviceKind, DType, Method, Scheme
from qbatch.core.recovery import Recovery, RecoveryKind
from qbatch.core.settings import Settings
from qbatch.models_db import checkpoints, finished_results, jobs
from qbatch.models_db.batches import NewJob
from qbatch.models_db.checkpoint_needs import why_needed
from qbatch.models_db.finished_results import find_finished
from qbatch.models_db.listing import list_jobs
from qbatch.models_db.results import find_results
from qbatch.models_db.session import Database
from qbatch.views.scheme import show_scheme
from qbatch.worker.checkpoints.publish import Origin, publish_adapter
from qbatch.worker.checkpoints.published import Published
from qbatch.worker.checkpoints.verify import verify
from qbatch.worker.files.staging import stage
from qbatch.worker.housekeeping.garbage import collect_garbage
from qbatch.worker.housekeeping.removed_targets import carry_out, plan_removal
from qbatch.worker.housekeeping.stale_files import Pruned
from tests.rows import PROTOCOL, a_batch, a_worker, claim, measured, spec
from tests.stored_checkpoints import identity_of, key_of, put_checkpoint

RECOVERY = Recovery(kind=RecoveryKind.SVD, rank=8)
ADAPTED = Scheme(method=Method.NF4, recovery=RECOVERY)
ADAPTER_KEY = hashlib.sha256(b"an adapter").hexdigest()
DAY_S = 86_400.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings.from_env({"QBATCH_HOME": str(tmp_path / "home")})
    settings.storage.mkdir(parents=True)
    return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A plain job and one with an adapter, of one model, both measured."""

    plain: int
    adapted: int
    base: str
    adapter: str

    def folders(self, settings: Settings) -> tuple[Path, Path]:
        return settings.storage / self.base, settings.storage / self.adapter


def put_adapter(settings: Settings, base: Published, own: str) -> Published:
    folder = stage(settings.staging / "w", 2, 1)
    factors = {"A": torch.zeros(8, 64), "B": torch.zeros(64, 8)}
    save_file({f"base_model.model.up.lora_{name}.weight": factors[name] for name in factors}, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps({"r": 8}))
    return publish_adapter(
        folder,
        storage=settings.storage,
        base=base,
        key=ADAPTER_KEY,
        origin=Origin(
            model="org/a",
            revision=None,
            fingerprint="f",
            scheme=ADAPTED,
            dtype=DType.BFLOAT16,
            device_kind="cpu",
            device_name="a CPU",
            versions={},
            database=own,
        ),
        audit={},
        recover_s=1.0,
        confirm=lambda: None,
    ).published


def record(database: Database, published: Published, job_id: int) -> None:
    with database.write() as session:
        checkpoints.record(
            session,
            key=published.key,
            path=published.path,
            root_sha256=published.root_sha256,
            disk_bytes=published.disk_bytes,
            job_id=job_id,
            versions={},
        )


def new_jobs() -> list[NewJob]:
    plain = spec("org/a")
    return [NewJob(spec=plain, bits=4), NewJob(spec=replace(plain, scheme=ADAPTED), bits=4)]


def a_measured_pair(database: Database, settings: Settings) -> Adapted:
    own = identity_of(database)
    _, ids = a_batch(database, new_jobs())
    base = put_checkpoint(settings, "org/a", database=own).published
    adapter = put_adapter(settings, base, own)
    keys = ((base.key, None), (adapter.key, base.key))
    tokens = sorted(claim(database, ids, a_worker(database)))
    for token, published, (key, base_key) in zip(tokens, (base, adapter), keys, strict=True):
        record(database, published, token[0])
        with database.write() as session:
            jobs.note(session, token, checkpoint_key=key, base_key=base_key)
            assert jobs.succeed(
                session,
                token,
                measured(),
                protocol=PROTOCOL.for_device(DeviceKind.CPU),
                checkpoint_path=published.path,
            )
    return Adapted(plain=ids[0], adapted=ids[1], base=base.path, adapter=adapter.path)


def rm(database: Database, settings: Settings, *, dry_run: bool = False, **targets: object) -> Mapping[str, Pruned]:
    removal = plan_removal(database, settings, **targets)  # type: ignore[arg-type]
    return {kind.what: kind for kind in carry_out(database, settings, removal, dry_run=dry_run)}


def test_rows_and_lists_name_the_adapter(database: Database, settings: Settings) -> None:
    pair = a_measured_pair(database, settings)
    with database.read() as session:
        rows = find_results(session)
        listed = list_jobs(session)
    assert [show_scheme(row) for row in rows] == ["bnb-nf4", "bnb-nf4+svd-r8"]
    assert [row.checkpoint_path for row in rows] == [pair.base, pair.adapter]
    assert rows[1].recovery == RECOVERY
    assert rows[1].to_json()["options"]["recovery"] == {"kind": "svd", "rank": 8, "writer": RECOVERY.writer}
    assert "recovery" not in rows[0].to_json()["options"]
    assert sorted(row["scheme"] for row in listed) == ["bnb-nf4", "bnb-nf4+svd-r8"]


def test_a_plain_job_stays_with_the_checkpoint_of_an_adapter(database: Database, settings: Settings) -> None:
    pair = a_measured_pair(database, settings)
    base, adapter = pair.folders(settings)
    for dry_run in (True, False):
        found = rm(database, settings, dry_run=dry_run, job_ids=[pair.plain])["checkpoints"]
        assert found.kept == ((pair.base, f"j{pair.adapted} has it too"),)
        assert (base.is_dir(), adapter.is_dir()) == (True, True)
    # With the last job that has both, both go.
    for dry_run in (True, False):
        found = rm(database, settings, dry_run=dry_run, job_ids=[pair.adapted])["checkpoints"]
        assert sorted(found.paths) == [pair.base, pair.adapter]
    assert (base.is_dir(), adapter.is_dir()) == (False, False)
    with database.read() as session:
        assert list(checkpoints.all_checkpoints(session)) == []


def test_an_adapter_goes_alone_and_its_checkpoint_stays_for_others(database: Database, settings: Settings) -> None:
    pair = a_measured_pair(database, settings)
    base, adapter = pair.folders(settings)
    found = rm(database, settings, job_ids=[pair.adapted])["checkpoints"]
    assert found.paths == (pair.adapter,)
    assert found.kept == ((pair.base, f"j{pair.plain} has it too"),)
    assert (base.is_dir(), adapter.is_dir()) == (True, False)


def test_a_checkpoint_that_is_named_goes_with_its_adapters(database: Database, settings: Settings) -> None:
    pair = a_measured_pair(database, settings)
    for dry_run in (True, False):
        found = rm(database, settings, dry_run=dry_run, paths=[pair.base])["checkpoints"]
        assert (sorted(found.paths), found.kept) == ([pair.base, pair.adapter], ())
    assert [folder.is_dir() for folder in pair.folders(settings)] == [False, False]


def test_what_is_kept_for_its_adapter_says_so(database: Database, settings: Settings) -> None:
    """As where `keep` finds the adapter's row the best."""
    pair = a_measured_pair(database, settings)
    for dry_run in (True, False):
        found = rm(database, settings, dry_run=dry_run, paths=[pair.base], within=[1])["checkpoints"]
        assert found.kept == ((pair.base, f"its adapter {Path(pair.adapter).name} needs it"),)
    assert all(folder.is_dir() for folder in pair.folders(settings))
    damaged = settings.storage / f"{pair.adapter}.rejected-1"
    (settings.storage / pair.adapter).rename(damaged)
    assert rm(database, settings, paths=[pair.base], within=[1])["checkpoints"].number == 1


def test_unreferenced_adapters_go_before_their_checkpoints(database: Database, settings: Settings) -> None:
    own = identity_of(database)
    base = put_checkpoint(settings, "org/a", database=own).published
    adapter = put_adapter(settings, base, own)
    for dry_run in (True, False):
        found = {kind.what: kind for kind in collect_garbage(database, settings, -1.0, dry_run=dry_run)}
        assert set(found["unreferenced checkpoints"].paths) == {base.path, adapter.path}
    assert not (settings.storage / base.path).exists()


def test_a_job_that_waits_with_an_adapter_needs_its_checkpoint(database: Database, settings: Settings) -> None:
    _, ids = a_batch(database, new_jobs())
    (token,) = claim(database, [ids[1]], a_worker(database))
    with database.write() as session:
        jobs.note(session, token, checkpoint_key=ADAPTER_KEY, base_key=key_of("org/a"))
        jobs.cancel(session, job_ids=[ids[0]])
    with database.read() as session:
        why = why_needed(session, key_of("org/a"), name="a", method="bnb-nf4")
    assert why == f"j{ids[1]} is running and needs it"


def test_a_result_answers_only_while_both_are_there(database: Database, settings: Settings) -> None:
    pair = a_measured_pair(database, settings)
    asked = {(ADAPTER_KEY, PROTOCOL.for_device(DeviceKind.CPU).hash)}
    with database.read() as session:
        (found,) = find_finished(session, asked, device_names=None).values()
    assert [part.path for part in found.parts] == [pair.base, pair.adapter]
    assert [part.versions for part in found.parts] == [{}, {}]
    with database.write() as session:
        assert finished_results.keep(session, {pair.adapted}) == {pair.adapted}
        checkpoints.note_presence(session, gone=[pair.base], present=[])
    with database.write() as session:
        assert find_finished(session, asked, device_names=None) == {}
        assert [row.checkpoint_path for row in find_results(session)] == [None, None]
        assert finished_results.keep(session, {pair.adapted}) == set()


def test_verifying_a_job_reads_the_checkpoint_of_its_adapter_too(database: Database, settings: Settings) -> None:
    pair = a_measured_pair(database, settings)
    with database.read() as session:
        found = checkpoints.checkpoints_of(session, [], [pair.adapted])
        assert [row.path for row in found] == [pair.base, pair.adapter]
        assert [row.path for row in checkpoints.checkpoints_of(session, [1])] == [pair.base, pair.adapter]
        assert [row.path for row in checkpoints.checkpoints_of(session, [], [pair.plain])] == [pair.base]


def test_an_adapter_without_its_checkpoint_is_damaged(database: Database, settings: Settings) -> None:
    pair = a_measured_pair(database, settings)
    base, adapter = pair.folders(settings)
    shutil.move(base, base.with_name("elsewhere"))
    assert verify(adapter) == [f"the checkpoint that it belongs to is not beside it: {base.name}"]
    manifest = base.with_name("elsewhere") / "qbatch.json"
    manifest.write_text(manifest.read_text().replace(key_of("org/a"), "0" * 64))
    shutil.move(base.with_name("elsewhere"), base)
    assert verify(adapter) == [f"it belongs to another checkpoint than {base.name}"]
    weights = adapter / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "has changed since it was published" in verify(adapter)[0]
