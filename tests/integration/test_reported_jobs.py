"""What a report is made from, on both databases."""

from __future__ import annotations

from qbatch.models_db.reported_jobs import reported_jobs
from qbatch.models_db.session import Database
from tests.reported import MODELS, SCHEMES, a_reported_batch


def test_every_job_is_there_in_order_with_its_result_and_its_hashes(database: Database) -> None:
    a_reported_batch(database, models=MODELS[:1], name="another")
    batch_id = a_reported_batch(database, models=MODELS[:3], failing=True)
    with database.read() as session:
        jobs = reported_jobs(session, [batch_id])
    assert [job.row.model for job in jobs] == [model for model, *_ in MODELS[:3] for _ in SCHEMES]
    assert [job.row.state for job in jobs] == ["succeeded"] * 6 + ["failed"] * 3
    for job in jobs[:6]:
        assert job.record.measured_at is not None
        assert (job.record.checkpoint is None) == job.row.is_baseline
        assert (job.baseline is None) == job.row.is_baseline
    assert [len(job.record.attempts) for job in jobs] == [1] * 9


def test_a_model_is_asked_for_by_a_part_of_its_name(database: Database) -> None:
    batch_id = a_reported_batch(database, models=MODELS[:3])
    with database.read() as session:
        jobs = reported_jobs(session, [batch_id], models=["3.2-3B"])
    assert {job.row.model for job in jobs} == {"meta-llama/Llama-3.2-3B"}
