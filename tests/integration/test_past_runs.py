"""How long jobs took, read from both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from qbatch.core.domain import DeviceKind, JobSpec
from qbatch.core.job_duration import Basis, JobWork, PastRun, estimate_duration
from qbatch.models_db.past_runs import past_runs
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt
from tests.rows import a_batch, a_worker, bundle, claim, spec, succeed


def work_off(database: Database, ids: list[int], worker: int, *, seconds: float) -> None:
    """Of the jobs of a bundle, the last one ends after ``seconds``, and the others before."""
    for token in claim(database, ids, worker):
        assert succeed(database, token)
    with database.write() as session:
        attempts = session.scalars(select(Attempt).where(Attempt.job_id.in_(ids)).order_by(Attempt.job_id)).all()
        for attempt in attempts:
            attempt.ended_at = attempts[0].claimed_at + timedelta(
                seconds=seconds / (2 if attempt.job_id < ids[-1] else 1)
            )


def read(database: Database, newest: int = 500) -> list[PastRun]:
    with database.read() as session:
        return past_runs(session, newest=newest)


def test_the_jobs_of_a_bundle_share_the_time_for_which_it_was_held(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a"), bundle("/models/b"))
    assert read(database) == []
    work_off(database, ids[:3], worker, seconds=60)
    work_off(database, ids[3:], worker, seconds=30)
    runs = read(database)
    assert [(run.work.location, round(run.seconds)) for run in runs] == [("/models/b", 10)] * 3 + [
        ("/models/a", 20)
    ] * 3
    assert {run.work.method for run in runs} == {"none", "bnb-nf4", "bnb-int8"}


def test_a_bundle_of_which_only_a_part_was_read_is_left_out(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a"), bundle("/models/b"))
    work_off(database, ids[:3], worker, seconds=60)
    work_off(database, ids[3:], worker, seconds=30)
    assert {run.work.location for run in read(database, newest=4)} == {"/models/b"}


@pytest.mark.parametrize("parameters", [10, 20])
def test_a_job_to_come_is_estimated_by_those_that_ended(database: Database, parameters: int) -> None:
    _, ids = a_batch(database, bundle("/models/a"))
    work_off(database, ids, a_worker(database), seconds=60)
    asked: JobSpec = spec("/models/new")
    estimate = estimate_duration(JobWork.of(asked, DeviceKind.CPU, parameters), read(database))
    assert estimate is not None
    assert (round(estimate.seconds), estimate.runs) == (2 * parameters, 1)
    assert estimate.basis is Basis.SAME_MEASUREMENT
