"""A device error is attributed to the job, to its model, or to the worker's device."""

from __future__ import annotations

import time

from qbatch.core.domain import Method
from qbatch.core.errors import DeviceError
from qbatch.models_db import jobs
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Worker
from tests.rows import a_batch, a_job, a_worker, bundle, claim, fail, states, succeed


def fails_on(database: Database, worker: int, job_id: int) -> None:
    time.sleep(0.05)
    (token,) = claim(database, [job_id], worker)
    fail(database, token, DeviceError("illegal memory access"))


def state_of(database: Database, worker: int) -> str:
    with database.read() as session:
        return session.get_one(Worker, worker).state


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


def test_one_model_with_device_errors_everywhere_costs_one_worker_at_most(database: Database) -> None:
    _, ids = a_batch(database, bundle("/models/a"))
    fleet = [a_worker(database, f"w{n}") for n in range(3)]
    for job, worker in [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (2, 1)]:
        fails_on(database, fleet[worker], ids[job])
    assert set(states(database).values()) == {"failed"}
    assert [state_of(database, worker) for worker in fleet] == ["quarantined", "ready", "ready"]


def test_after_such_a_model_a_sick_device_is_still_found(database: Database) -> None:
    first, second = a_worker(database, "w1"), a_worker(database, "w2")
    _, ids = a_batch(database, *[bundle(f"/models/{name}", Method.NF4) for name in "abc"])
    fails_on(database, first, ids[0])
    for job_id in ids:
        fails_on(database, second, job_id)
    assert [state_of(database, worker) for worker in (first, second)] == ["ready", "quarantined"]


def test_a_worker_that_was_started_again_is_another_one_on_the_same_gpu(database: Database) -> None:
    _, ids = a_batch(database, *[bundle(f"/models/{name}", Method.NF4) for name in "ab"])
    before, after = a_worker(database, "before", uuid="GPU-1"), a_worker(database, "after", uuid="GPU-1")
    fails_on(database, before, ids[0])
    for job_id in ids:
        fails_on(database, after, job_id)
    assert state_of(database, after) == "quarantined"


def test_a_success_clears_the_worker(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a"), bundle("/models/b"))
    fails_on(database, worker, ids[0])
    (token,) = claim(database, [ids[1]], worker)
    assert succeed(database, token)
    fails_on(database, worker, ids[3])
    assert state_of(database, worker) == "ready"
