"""What is on record about jobs and the installation, asked of both databases."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import update

from qbatch.core.byte_units import GIB
from qbatch.core.domain import DeviceKind, Method
from qbatch.core.errors import CudaOom, FetchError
from qbatch.models_db import checkpoints, jobs, listing
from qbatch.models_db.batches import NewJob
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.health import health
from qbatch.models_db.job_record import job_records, whole_jobs
from qbatch.models_db.leases import acquire
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job, Pause
from tests.rows import a_batch, a_gpu, a_worker, add_batch, bundle, claim, fail, spec, succeed


def test_a_job_is_told_with_its_attempts_its_checkpoint_and_its_baseline(database: Database) -> None:
    worker_id = a_worker(database, "cpu@here")
    _, (baseline, nf4, _) = a_batch(database)
    for token in claim(database, [baseline], worker_id):
        assert succeed(database, token)
    (token,) = claim(database, [nf4], worker_id)
    assert fail(database, token, FetchError("the hub is away"))
    with database.write() as session:
        session.get_one(Job, nf4).not_before = None
    (token,) = claim(database, [nf4], worker_id)
    with database.write() as session:
        jobs.note(session, token, checkpoint_key="k" * 64)
        checkpoints.record(session, key="k" * 64, path="checkpoints/x", root_sha256="5" * 64, disk_bytes=7, job_id=nf4)
    assert succeed(database, token)
    with database.read() as session:
        (job,) = whole_jobs(session, [nf4])
    row = job.to_json()
    assert job.baseline is not None
    assert job.baseline.job_id == f"j{baseline}"
    assert (row["state"], row["attempt"], row["failures"]) == ("succeeded", 2, 1)
    assert [(one["outcome"], one["worker"], one["message"]) for one in row["attempts"]] == [
        ("fetch_error", "cpu@here", "the hub is away"),
        ("succeeded", "cpu@here", None),
    ]
    assert all(one["seconds"] >= 0 for one in row["attempts"])
    assert row["checkpoint"]["root_sha256"] == "5" * 64
    assert row["options"]["double_quant"] is False
    assert row["protocol"]["prompt_tokens"] == 64
    assert row["measured_at"] is not None


def test_jobs_come_in_the_order_asked_for_and_answers_bring_their_result(database: Database) -> None:
    worker_id = a_worker(database)
    _, job_ids = a_batch(database)
    (token,) = claim(database, [job_ids[0]], worker_id)
    assert succeed(database, token)
    with database.write() as session:
        answered = NewJob(spec=spec(method=Method.NONE), bits=16, reused_from=job_ids[0])
        batch_id = add_batch(session, [[answered]])
    with database.read() as session:
        (number,) = session.scalars(Job.__table__.select().with_only_columns(Job.id).where(Job.batch_id == batch_id))
        found = whole_jobs(session, [number, job_ids[1], 999])
        assert whole_jobs(session, []) == []
    assert [job.row.job_id for job in found] == [f"j{number}", f"j{job_ids[1]}"]
    assert found[0].row.reused_from == f"j{job_ids[0]}"
    assert found[0].row.num_parameters == 10
    assert found[0].record.attempts == ()
    assert found[1].record.checkpoint is None


def test_health_is_counted_by_the_database_s_clock(database: Database) -> None:
    worker_id = a_worker(database, "w1")
    _, job_ids = a_batch(database)
    tokens = claim(database, job_ids[:2], worker_id)
    for token in tokens:
        assert fail(database, token, CudaOom("no room"))
    with database.write() as session:
        session.get_one(Job, job_ids[0]).finished_at = db_now(-timedelta(days=2).total_seconds())
        acquire(session, "scheduler", "a", 60.0)
        session.add(Pause(reason="disk", message="full", until=db_now(60.0)))
        session.add(Pause(reason="old", message="full", until=db_now(-60.0)))
    with database.read() as session:
        found = health(session, 60.0)
    assert found.leader == "a"
    assert [worker["state"] for worker in found.workers] == ["ready"]
    assert found.open_jobs == {"queued": 1}
    assert found.failed == {"cuda_oom": 1}
    assert [pause.reason for pause in found.pauses] == ["disk"]
    with database.write() as session:
        acquire(session, "scheduler", "a", -1.0)
    with database.read() as session:
        assert health(session, 60.0).leader is None


def test_a_memory_need_says_whether_it_is_predicted_or_seen(database: Database) -> None:
    small, _ = a_gpu(database, 24), a_gpu(database, 80)
    _, ids = a_batch(
        database,
        bundle("/a", Method.NF4, Method.INT8, device=DeviceKind.CUDA, needs={Method.INT8: 12 * GIB}),
        bundle("/b", Method.NF4, device=DeviceKind.CUDA, needs={Method.NF4: 90 * GIB}),
    )

    def needs() -> list[tuple[int | None, str | None]]:
        with database.read() as session:
            listed = [(row["above_memory_bytes"], row["above_memory_is"]) for row in listing.list_jobs(session)]
            on_record = [(row.above_memory_bytes, row.above_memory_is) for row in job_records(session, ids)]
        assert listed == on_record
        return listed

    assert needs() == [(None, None), (12 * GIB, "predicted"), (90 * GIB, "predicted")]
    unknown, int8, large = claim(database, ids, small)
    for token in (unknown, int8, large):
        assert fail(database, token, CudaOom("CUDA out of memory"))
    assert needs() == [(24 * GIB, "seen")] * 3
    with database.write() as session:
        session.execute(update(Job).where(Job.id == ids[0]).values(state="failed"))
        assert jobs.retry(session, job_ids=[ids[0]]) == [ids[0]]
    assert needs()[0] == (24 * GIB, "seen"), "a retry forgives, and the GPU is as small as before"


def test_what_was_seen_on_a_gpu_is_noted_of_a_job_that_may_run_anywhere(database: Database) -> None:
    """A CPU may not have it either, whatever the last error was."""
    small, _ = a_gpu(database, 24), a_gpu(database, 80)
    _, ids = a_batch(
        database, bundle("/a", Method.NF4, Method.INT8, device=DeviceKind.AUTO, needs={Method.INT8: 12 * GIB})
    )
    (token, _) = sorted(claim(database, ids, small))
    assert fail(database, token, CudaOom("CUDA out of memory"))
    with database.write() as session:
        session.execute(update(Job).where(Job.id == token[0]).values(error_kind="worker_lost"))
    with database.read() as session:
        notes = {row["job_id"]: row["note"] for row in listing.list_jobs(session, states=["queued"])}
    assert notes == {f"j{token[0]}": "needs a GPU of more than 24 GiB"}
