"""How full and how busy devices are, from the kernel to the list of workers."""

from __future__ import annotations

import psutil

from qbatch.core.device_load import DeviceLoad
from qbatch.models_db import workers
from qbatch.models_db.listing import list_workers
from qbatch.models_db.session import Database
from qbatch.worker.machine.device_meter import read_load
from tests.rows import a_worker


def test_the_load_of_a_cpu_is_that_of_its_host() -> None:
    read_load(None)
    load = read_load(None)
    assert load.used_bytes is not None
    assert load.busy_share is not None
    assert 0 < load.used_bytes < psutil.virtual_memory().total
    assert 0 <= load.busy_share <= 1


def test_a_gpu_that_does_not_answer_has_no_load() -> None:
    assert read_load("GPU-none") == DeviceLoad()


def test_a_heartbeat_renews_what_is_listed_and_a_lost_worker_has_no_load(database: Database) -> None:
    worker = a_worker(database)

    def listed(lease_s: float = 60.0) -> list[tuple[int | None, float | None]]:
        with database.read() as session:
            return [(row["used_bytes"], row["busy_share"]) for row in list_workers(session, lease_s)]

    assert listed() == [(None, None)], "as of a worker of an older version"
    for load, known in (
        (DeviceLoad(used_bytes=2**40, busy_share=0.5), (2**40, 0.5)),
        (None, (2**40, 0.5)),
        (DeviceLoad(used_bytes=1), (1, None)),
    ):
        with database.write() as session:
            workers.beat(session, worker, load)
        assert listed() == [known]
    assert listed(lease_s=-60.0) == [(None, None)]
