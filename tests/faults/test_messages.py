"""Messages vanish, come twice, or cannot be sent: jobs are late at worst, and none runs twice."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import kombu.pools
import psutil
import pytest

from qbatch.core.domain import DeviceKind
from qbatch.core.settings import Settings
from qbatch.models_db import window
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Batch, Lease
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.dispatch import top_up
from qbatch.scheduler.loop import Scheduler
from qbatch.scheduler.queues import queue_of, redis_priority
from tests.faults.conftest import MakeModel
from tests.faults.fleet import Fleet
from tests.faults.fleet_services import PASSWORD, Redis, Wire
from tests.rows import a_batch, a_job, a_worker, bundle

CPU = queue_of(DeviceKind.CPU)
# Where kombu puts what has no priority of its own.
LIST = f"{CPU}\x06\x16{redis_priority(0)}"
# A worker's BRPOP is answered by then, message or none.
_BRPOP_S = 1.5


def idle(fleet: Fleet) -> list[psutil.Process]:
    return [fleet.celery("w1"), fleet.celery("w2")]


def test_a_job_whose_message_died_with_an_idle_worker_runs(
    fleet: Fleet, redis_server: Redis, make_model: MakeModel
) -> None:
    workers = idle(fleet)
    broker = Broker(fleet.settings)
    with fleet.suspended(psutil.Process(fleet.running["scheduler"].pid)):
        (job,) = fleet.submit(make_model(), send=False)
        for _ in range(10):
            if _is_swallowed(fleet, redis_server, broker, workers):
                break
        else:
            raise AssertionError("no suspended worker ever swallowed the message")
        for worker in workers:
            worker.kill()
    broker.close()
    fleet.succeed([job])
    assert fleet.outcomes(job) == ["succeeded"]
    fleet.wait_for_live(2)


def _is_swallowed(fleet: Fleet, redis_server: Redis, broker: Broker, workers: list[psutil.Process]) -> bool:
    """Suspend idle workers and send: whether Redis gave the message to one of them. If not, all is as it was."""
    broker.ping()
    fleet.suspend(*workers)
    assert top_up(fleet.database, broker, fleet.settings) == 1
    with fleet.database.read() as session:
        sent = window.waiting_messages(session)
    if not broker.message_ids([CPU]):
        return True
    with redis_server.client() as client:
        client.delete(LIST)
    with fleet.database.write() as session:
        window.take_out(session, sent)
    for worker in workers:
        worker.resume()
    time.sleep(_BRPOP_S)
    return False


def test_a_message_delivered_twice_at_once_is_claimed_by_one_worker(
    fleet: Fleet, redis_server: Redis, make_model: MakeModel
) -> None:
    broker = Broker(fleet.settings)
    with fleet.suspended(psutil.Process(fleet.running["scheduler"].pid)):
        (job,) = fleet.submit(make_model(), send=False)
        with fleet.suspended(*idle(fleet)), redis_server.client() as client:
            time.sleep(_BRPOP_S)
            assert top_up(fleet.database, broker, fleet.settings) == 1
            (dispatch_id,) = broker.message_ids([CPU])
            (message,) = client.lrange(LIST, 0, -1)
            client.lpush(LIST, message)
        fleet.succeed([job])
    assert fleet.outcomes(job) == ["succeeded"]
    fleet.wait_for(lambda: broker.message_ids([CPU]) == frozenset(), "acknowledgement of both")
    fleet.wait_for(lambda: all(_answers(fleet, dispatch_id)), "the answers of both workers")
    assert sorted(_answers(fleet, dispatch_id)) == [["nothing to do"], ["recorded"]]
    broker.close()


def _answers(fleet: Fleet, dispatch_id: str) -> list[list[str]]:
    """What the tasks of each of two workers returned for this message, as Celery logged it."""
    answer = re.compile(rf"\[{dispatch_id}\] succeeded in \S+: '(.*)'")
    return [answer.findall(fleet.log(name).read_text()) for name in ("w1", "w2")]


def test_a_vanished_message_before_a_thousand_is_sent_again_in_two_scans(
    sqlite_database: Database, redis_server: Redis, tmp_path: Path
) -> None:
    url = f"redis://:{PASSWORD}@127.0.0.1:{redis_server.port}/7"
    settings = Settings(
        home=tmp_path, storage=tmp_path, cache=tmp_path, broker_url=url, window=2000, scan_s=0.01, heartbeat_s=30.0
    )
    a_worker(sqlite_database)
    _, ids = a_batch(sqlite_database, *[bundle(f"/models/{n}")[:1] for n in range(1001)])
    broker = Broker(settings)
    assert top_up(sqlite_database, broker, settings) == 1001
    lost = a_job(sqlite_database, ids[0]).dispatch_id
    with redis_server.client() as client:
        client.select(7)
        (message,) = [text for text in client.lrange(LIST, 0, -1) if str(lost) in text]
        assert client.lrem(LIST, 1, message) == 1
    scheduler = Scheduler(sqlite_database, broker, settings)
    scheduler.tick()
    assert a_job(sqlite_database, ids[0]).dispatch_id == lost, "one scan may have looked between a pop and its note"
    time.sleep(settings.scan_s)
    scheduler.tick()
    assert a_job(sqlite_database, ids[0]).dispatch_id not in (None, lost)
    standing = broker.message_ids([CPU])
    assert len(standing) == 1001
    assert a_job(sqlite_database, ids[0]).dispatch_id in standing
    broker.close()


@pytest.mark.parametrize("fault", ["killed, with AOF", "flushed", "cut off"])
def test_jobs_continue_whatever_happens_to_redis(
    fleet: Fleet, redis_server: Redis, wire: Wire, make_model: MakeModel, fault: str
) -> None:
    if fault == "killed, with AOF":
        redis_server.keep_everything()
    workers = idle(fleet)
    fleet.wait_for_workers(2)
    jobs = fleet.submit(*[make_model() for _ in range(3)])
    fleet.wait_for(lambda: sum(job.state == "running" for job in fleet.jobs(jobs)) == 2, "two running jobs")
    vanished = _vanished(fleet)
    _befall(fault, redis_server, wire)
    later: list[int] = []

    def both_consume() -> bool:
        # One may be back long before the other, and must not have done everything by then.
        if all(job.state == "succeeded" for job in fleet.jobs(later)):
            later.extend(fleet.submit(*[make_model() for _ in range(3)], send=False))
        return _consumers(fleet, later) == 2

    fleet.wait_for(both_consume, "job for each worker")
    fleet.succeed(jobs + later)
    assert [fleet.outcomes(job) for job in jobs + later] == [["succeeded"]] * len(jobs + later)
    assert workers == idle(fleet), "without a restart"
    if fault == "killed, with AOF":
        assert _vanished(fleet) == vanished


def _consumers(fleet: Fleet, jobs: list[int]) -> int:
    """How many workers have claimed some of ``jobs``."""
    return len({job.worker_id for job in fleet.jobs(jobs)} - {None})


def _befall(fault: str, redis_server: Redis, wire: Wire) -> None:
    if fault == "flushed":
        with redis_server.client() as client:
            client.flushall()
    elif fault == "cut off":
        wire.cut()
        time.sleep(60.0)
        wire.mend()
        kombu.pools.reset()  # what this process had open is as dead
    else:
        redis_server.kill()
        time.sleep(1.0)
        redis_server.start(aof=True)


def _vanished(fleet: Fleet) -> int:
    return fleet.log("scheduler").read_text().count("vanished from Redis")


def test_when_the_leading_scheduler_is_killed_another_leads(fleet: Fleet, make_model: MakeModel) -> None:
    fleet.start("scheduler2", "scheduler")
    first = _leader(fleet)
    jobs = fleet.submit(*[make_model() for _ in range(2)])
    fleet.wait_for(lambda: any(job.state != "queued" for job in fleet.jobs(jobs)), "job under way")
    fleet.kill_host("scheduler")
    fleet.wait_for(lambda: _leader(fleet) != first, "another leader")
    jobs += fleet.submit(make_model(), send=False)
    fleet.start("scheduler", "scheduler")
    fleet.succeed(jobs)
    assert [fleet.outcomes(job) for job in jobs] == [["succeeded"]] * 3
    assert fleet.stop("scheduler2") == 0


def _leader(fleet: Fleet) -> str:
    with fleet.database.read() as session:
        return session.get_one(Lease, "scheduler").holder


def test_a_submit_killed_between_rows_and_messages_loses_no_job(
    fleet: Fleet, redis_server: Redis, make_model: MakeModel, tmp_path: Path
) -> None:
    listed = tmp_path / "models.txt"
    listed.write_text(f"{make_model()}\n")
    before = _last_batch(fleet)
    with fleet.suspended(psutil.Process(redis_server.pid)), (tmp_path / "submit.log").open("wb") as log:
        # Its first word to Redis waits for an answer.
        submit = subprocess.Popen(
            [*fleet.program, "submit", "--models", str(listed), "--bits", "4", "--no-baseline"],
            env=fleet.qbatch.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        fleet.wait_for(lambda: _last_batch(fleet) > before, "batch")
        submit.kill()
        assert submit.wait() == -9
    (job,) = fleet.jobs_of(_last_batch(fleet))
    fleet.succeed([job])
    assert fleet.outcomes(job) == ["succeeded"]


def test_a_scheduler_killed_between_marks_and_messages_loses_no_job(
    fleet: Fleet, redis_server: Redis, make_model: MakeModel
) -> None:
    with fleet.suspended(psutil.Process(redis_server.pid)):
        (job,) = fleet.submit(make_model(), send=False)
        fleet.wait_for(lambda: fleet.job(job).dispatch_id is not None, "mark")
        fleet.kill_host("scheduler")
    assert fleet.job(job).state == "queued"
    fleet.start("scheduler", "scheduler")
    fleet.succeed([job])
    assert fleet.outcomes(job) == ["succeeded"]


def _last_batch(fleet: Fleet) -> int:
    with fleet.database.read() as session:
        return max((batch.id for batch in session.query(Batch)), default=0)
