"""Whose a device error is: the job's, its model's, or the worker's that had it."""

from __future__ import annotations

import time

from models_db import jobs
from models_db.domain import Method
from models_db.errors import DeviceError
from models_db.session import Database
from tests.rows import a_batch, a_job, a_worker, bundle, claim, fail


def fails_on(database: Database, worker: int, job_id: int) -> None:
    time.sleep(0.05)
    (token,) = claim(database, [job_id], worker)
    fail(database, token, DeviceError("illegal memory access"))


def test_a_job_that_three_devices_failed_on_has_three_more_after_a_retry(database: Database) -> None:
    _, (job_id,) = a_batch(database, bundle("/models/a", Method.NF4))
    ends = []
    for n in range(6):
        fails_on(database, a_worker(database, f"w{n}"), job_id)
        ends.append(a_job(database, job_id).state)
        if ends[-1] == "failed":
            with database.write() as session:
                jobs.retry(session, job_ids=[job_id])
    assert ends == ["queued", "queued", "failed"] * 2
