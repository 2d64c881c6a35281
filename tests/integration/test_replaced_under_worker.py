"""A worker whose database was replaced does not touch rows with the same ids in the new one."""

from __future__ import annotations

import multiprocessing
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import delete, select, text, update

from qbatch.core.digest import Checksums
from qbatch.core.domain import Claim, DeviceKind, Method, Stage
from qbatch.core.errors import DatabaseReplaced
from qbatch.core.file_stat import Mounts, stat_file
from qbatch.core.settings import Settings
from qbatch.models_db import file_digests, jobs
from qbatch.models_db.batches import NewJob
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Checkpoint, FileDigestRow
from qbatch.models_db.tables import Worker as WorkerRow
from qbatch.worker.checkpoints.published import Published
from qbatch.worker.runner.messages import CheckpointVerified, Entered, FilesHashed, FilesSeen, JobIdentity, Resolved
from qbatch.worker.serving.answers import Answers
from qbatch.worker.serving.celery_worker import CeleryWorker
from qbatch.worker.serving.supervisor import Supervisor, WorkerContext
from tests.rows import PROTOCOL, a_batch, a_job, a_worker, claim, measured, spec
from tests.worker_context import a_worker_context, settings_in

KEY = "A" * 64
ADDRESS = PROTOCOL.for_device(DeviceKind.CPU)
LONG_AGO_S = 1000.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
def context(database: Database, settings: Settings) -> WorkerContext:
    return a_worker_context(database, settings)


def baseline() -> NewJob:
    return NewJob(spec=spec(method=Method.NONE), bits=16, checkpoint_key=KEY)


def claimed(context: WorkerContext) -> Claim:
    _, ids = a_batch(context.database, [baseline()])
    with context.database.write() as session:
        (one,) = jobs.claim(session, ids, context.worker_id, 60.0)
    return one


def replace(database: Database) -> None:
    """Another one has the same rows by chance, and another name."""
    with database.read() as session:
        database.require_own(session)
    with database.write() as session:
        session.execute(text("UPDATE identity SET id = 'another'"))


def earlier_result(context: WorkerContext) -> None:
    _, ids = a_batch(context.database, [baseline()])
    (token,) = claim(context.database, ids, context.worker_id)
    with context.database.write() as session:
        assert jobs.succeed(session, token, measured(), protocol=ADDRESS, checkpoint_path=None)


def answers(context: WorkerContext, one: Claim) -> Answers:
    return Answers(context.database, context.settings.storage, context.device_name, {one.job_id: one})


def test_no_job_is_answered_there(context: WorkerContext) -> None:
    earlier_result(context)
    one = claimed(context)
    asked = Resolved(jobs={one.job_id: JobIdentity(key=KEY, legacy_key=None, protocol_hash=ADDRESS.hash)})
    replace(context.database)
    assert answers(context, one).find(asked).job_ids == frozenset()
    assert a_job(context.database, one.job_id).state == "running"


def test_no_checkpoint_is_called_verified_there(context: WorkerContext) -> None:
    one = claimed(context)
    with context.database.write() as session:
        session.add(Checkpoint(key=KEY, path="checkpoints/x", root_sha256="r" * 64, disk_bytes=7))
    replace(context.database)
    published = Published(
        key=KEY, path="checkpoints/x", root_sha256="r" * 64, disk_bytes=7, audit={}, quantize_s=1.0, versions={"x": "1"}
    )
    answers(context, one).verified(CheckpointVerified(published=published))
    with context.database.read() as session:
        assert session.get_one(Checkpoint, KEY).file_versions is None


def test_no_lease_is_renewed_and_no_stage_noted_there(context: WorkerContext) -> None:
    one = claimed(context)
    replace(context.database)
    before = a_job(context.database, one.job_id)
    supervisor = Supervisor(context, [one])
    for renew in (True, False):
        assert supervisor._still_ours(renew=renew), "it is the worker's to leave"
    supervisor._entered(Entered(job_ids=(one.job_id,), stage=Stage.LOADING))
    after = a_job(context.database, one.job_id)
    assert (after.lease_expires_at, after.stage) == (before.lease_expires_at, before.stage)


def test_no_checksums_are_taken_from_there_or_kept_there(context: WorkerContext, tmp_path: Path) -> None:
    one = claimed(context)
    known, new = tmp_path / "known", tmp_path / "new"
    for path in (known, new):
        path.write_text("{}")
    stats = {path: stat_file(path, Mounts()) for path in (known, new)}
    sums = Checksums(chunk_sha256=("0" * 64,), sha256=None)
    with context.database.write() as session:
        file_digests.remember(session, {stats[known]: sums})
    replace(context.database)
    supervisor = Supervisor(context, [one])
    assert supervisor._files.known(FilesSeen(stats=(stats[known],))) == {}
    supervisor._files.remember(FilesHashed(digests={stats[new]: sums}))
    with context.database.read() as session:
        assert list(session.scalars(select(FileDigestRow.path))) == [str(known)]


@pytest.fixture
def worker(database: Database, settings: Settings) -> CeleryWorker:
    found = CeleryWorker(settings, None, multiprocessing.get_context("forkserver"), drain=False)
    found._database.dispose()
    found._database = database
    return found


def age(database: Database, worker_id: int) -> datetime | None:
    with database.write() as session:
        session.execute(update(WorkerRow).where(WorkerRow.id == worker_id).values(heartbeat_at=db_now(-LONG_AGO_S)))
    return state_of(database, worker_id)[1]


def state_of(database: Database, worker_id: int) -> tuple[str, datetime | None]:
    with database.read() as session:
        row = session.get_one(WorkerRow, worker_id)
        return row.state, row.heartbeat_at


def test_a_worker_of_the_same_id_there_lives_on_as_it_did(database: Database, worker: CeleryWorker) -> None:
    worker_id = a_worker(database)
    replace(database)
    heartbeat = age(database, worker_id)
    with pytest.raises(DatabaseReplaced) as raised:
        worker._renew(worker_id)
    worker._shutdown.request(raised.value)
    worker._announce_shutdown(worker_id, raised.value)
    worker._leave(worker_id)
    assert state_of(database, worker_id) == ("ready", heartbeat)


def test_an_idle_worker_that_is_not_listed_there_notices(database: Database, worker: CeleryWorker) -> None:
    worker_id = a_worker(database)
    replace(database)
    with database.write() as session:
        session.execute(delete(WorkerRow))
    with pytest.raises(DatabaseReplaced):
        worker._renew(worker_id)


def test_nothing_is_swept_for_what_is_not_held_there(database: Database, worker: CeleryWorker) -> None:
    replace(database)
    with pytest.raises(DatabaseReplaced):
        worker._held_jobs([(1, 1)])


def test_nobody_registers_there(database: Database, worker: CeleryWorker) -> None:
    replace(database)
    with pytest.raises(DatabaseReplaced):
        worker._register()
    with database.read() as session:
        assert session.scalars(select(WorkerRow.id)).all() == []
