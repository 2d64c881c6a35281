"""The window in a real Redis: rows first, messages second, and what vanishes is sent again."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import Connection, event, func, select, update
from sqlalchemy.orm import Session

from qbatch.core.byte_units import GIB
from qbatch.core.domain import DeviceKind, Method
from qbatch.core.errors import BrokerUnreachable, CudaOom
from qbatch.core.retry_policy import RetryLimits
from qbatch.core.settings import Settings
from qbatch.models_db import jobs, window
from qbatch.models_db.backlog_looks import BacklogLooks
from qbatch.models_db.batches import NewJob
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job, Worker
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.dispatch import top_up
from qbatch.scheduler.private_redis import redis_server_path
from qbatch.scheduler.queues import queue_of, queues_of
from qbatch.scheduler.reconcile import fail_jobs_without_gpu, resend_vanished
from tests.rows import a_batch, a_gpu, a_job, a_worker, bundle, claim, fail, states, succeed
from tests.waiting import until

CPU = queue_of(DeviceKind.CPU)


class SocketRedis:
    """A real one on a unix socket, that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.socket = folder / "r.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [redis_server_path(), "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir"]
        self._process = subprocess.Popen([*argv, str(self._folder)], stdout=subprocess.DEVNULL)
        until(self._answers, "Redis")

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), decode_responses=True)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None


@pytest.fixture
def server() -> Iterator[SocketRedis]:
    # pytest's own folders are too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="qb-"))
    server = SocketRedis(folder)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def settings(server: SocketRedis, tmp_path: Path) -> Settings:
    url = f"redis+socket://{server.socket}?virtual_host=0"
    return Settings(home=tmp_path, storage=tmp_path, cache=tmp_path, broker_url=url, window=4)


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    broker = Broker(settings)
    yield broker
    broker.close()


def dispatched(database: Database) -> dict[str, str]:
    with database.read() as session:
        return window.waiting_messages(session)


def test_the_window_is_filled_and_its_messages_stand_in_redis(
    sqlite_database: Database, broker: Broker, settings: Settings
) -> None:
    a_worker(sqlite_database)
    a_batch(sqlite_database, *[bundle(f"/models/{n}") for n in range(6)])
    assert top_up(sqlite_database, broker, settings) == 4
    assert top_up(sqlite_database, broker, settings) == 0, "the window is full"
    assert broker.message_ids([CPU]) == dispatched(sqlite_database).keys()
    assert set(dispatched(sqlite_database).values()) == {CPU}


class SlowClock:
    """A second passes each time that somebody looks at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_backlog_that_belongs_elsewhere_is_read_by_itself_and_seldom(
    sqlite_database: Database, broker: Broker, settings: Settings
) -> None:
    """Nobody else could write meanwhile, and it would be read at each tick."""
    a_gpu(sqlite_database, 24)
    a_gpu(sqlite_database, 80)
    needs = {Method.NONE: 30 * GIB, Method.NF4: 5 * GIB}
    large = [bundle(f"/models/{n}", Method.NONE, Method.NF4, device=DeviceKind.CUDA, needs=needs) for n in range(60)]
    small = [bundle(f"/small/{n}", Method.NF4, device=DeviceKind.CUDA, needs=needs) for n in range(2)]
    _, ids = a_batch(sqlite_database, *large, small[0])
    clock = SlowClock()
    looks = BacklogLooks(clock=clock)
    read: list[bool] = []

    def note(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if "row_number()" in statement:
            read.append(connection.get_execution_options().get("qbatch_read", False))

    event.listen(sqlite_database.engine, "before_cursor_execute", note)
    assert top_up(sqlite_database, broker, settings, looks) == 4 + 1
    assert read == [True]
    with sqlite_database.read() as session:
        assert session.get_one(Job, ids[-1]).queue == queue_of(DeviceKind.CUDA, 24)
    a_batch(sqlite_database, *large, small[1])
    assert top_up(sqlite_database, broker, settings, looks) == 0, "it took a second, and not ten have passed"
    clock.now += 10.0
    assert top_up(sqlite_database, broker, settings, looks) == 1
    assert read == [True, True]


def test_of_two_that_choose_at_once_one_leaves_it_to_the_other(
    postgresql_database: Database, broker: Broker, settings: Settings
) -> None:
    """Neither sees the other's marks: both would send a part of one bundle, of which one part is sent at a time."""
    a_worker(postgresql_database)
    a_batch(postgresql_database, bundle("/models/a", *[Method.NF4] * 300))
    with postgresql_database.write() as session:
        assert window.is_only_chooser(session)
        assert top_up(postgresql_database, broker, settings) == 0
    assert top_up(postgresql_database, broker, settings) == 1


def test_backlogs_that_belong_elsewhere_keep_no_other_queue_waiting(
    sqlite_database: Database, broker: Broker, settings: Settings
) -> None:
    """Each is looked at, and none again and again in place of the next one."""
    for size in (80, 48, 24, 8):
        a_gpu(sqlite_database, size)
    a_worker(sqlite_database)
    methods = (Method.NONE, Method.INT8, Method.FP4, Method.NF4)
    needs = dict(zip(methods, (60 * GIB, 30 * GIB, 18 * GIB, 5 * GIB), strict=True))
    for priority in (5, 4):
        mixed = [bundle(f"/{priority}/{n}", *methods, device=DeviceKind.CUDA, needs=needs) for n in range(12)]
        a_batch(sqlite_database, *mixed, priority=priority)
    small = [bundle(f"/small/{n}", Method.NF4, device=DeviceKind.CUDA, needs=needs) for n in range(3)]
    _, on_small = a_batch(sqlite_database, *small, priority=4)
    _, (on_cpu, *_) = a_batch(sqlite_database, bundle("/models/cpu"), priority=9)
    top_up(sqlite_database, broker, settings, BacklogLooks(clock=lambda: 0.0))
    with sqlite_database.read() as session:
        assert session.get_one(Job, on_cpu).queue == CPU
        assert {session.get_one(Job, job).queue for job in on_small} == {queue_of(DeviceKind.CUDA, 8)}


def test_a_large_window_is_filled_in_several_transactions(
    sqlite_database: Database, broker: Broker, settings: Settings
) -> None:
    """Each is short for those who write meanwhile, and together they share as one would have done."""
    a_worker(sqlite_database)
    batches = [a_batch(sqlite_database, *[bundle(f"/models/{b}-{n}")[:1] for n in range(80)])[0] for b in range(2)]
    marked: list[int] = []

    def note(session: Session) -> None:
        marked.append(len(window.waiting_messages(session)))

    event.listen(Session, "before_commit", note)
    try:
        assert top_up(sqlite_database, broker, replace(settings, window=120)) == 120
    finally:
        event.remove(Session, "before_commit", note)
    assert marked == [50, 100, 120]
    assert broker.message_ids([CPU]) == dispatched(sqlite_database).keys()
    with sqlite_database.read() as session:
        sent = select(Job.batch_id, func.count()).where(Job.dispatch_id > "").group_by(Job.batch_id)
        assert {batch: count for batch, count in session.execute(sent)} == dict.fromkeys(batches, 60)


def test_without_a_live_worker_nothing_is_sent(sqlite_database: Database, broker: Broker, settings: Settings) -> None:
    a_batch(sqlite_database)
    assert top_up(sqlite_database, broker, settings) == 0
    assert broker.message_ids([CPU]) == frozenset()


def test_after_redis_forgot_everything_it_is_sent_again_at_the_second_scan(
    sqlite_database: Database, broker: Broker, settings: Settings, server: SocketRedis
) -> None:
    a_worker(sqlite_database)
    a_batch(sqlite_database, bundle("/models/a"), bundle("/models/b"))
    top_up(sqlite_database, broker, settings)
    before = set(dispatched(sqlite_database))
    with server.client() as client:
        client.flushall()
    resend_vanished(sqlite_database, broker)
    assert set(dispatched(sqlite_database)) == before, "one scan may have looked between a pop and its note"
    resend_vanished(sqlite_database, broker)
    assert dispatched(sqlite_database) == {}
    assert top_up(sqlite_database, broker, settings) == 2
    assert broker.message_ids([CPU]) == dispatched(sqlite_database).keys()
    assert before.isdisjoint(dispatched(sqlite_database))


def test_a_message_behind_a_thousand_others_is_not_mistaken_for_lost(
    sqlite_database: Database, broker: Broker, settings: Settings
) -> None:
    a_worker(sqlite_database)
    broker.send(
        window.Dispatch(dispatch_id=f"other-{n}", queue=CPU, priority=0, job_ids=(n,), label="") for n in range(1, 1001)
    )
    a_batch(sqlite_database)
    assert top_up(sqlite_database, broker, settings) == 1
    for _ in range(3):
        resend_vanished(sqlite_database, broker)
    assert len(dispatched(sqlite_database)) == 1
    assert len(broker.message_ids([CPU])) == 1001


def test_a_message_popped_and_not_acknowledged_counts_as_standing(
    sqlite_database: Database, broker: Broker, settings: Settings
) -> None:
    from qbatch.scheduler.celery_app import make_app

    a_worker(sqlite_database)
    a_batch(sqlite_database)
    top_up(sqlite_database, broker, settings)
    with make_app(settings) as app, app.connection_for_read() as connection, connection.SimpleQueue(CPU) as queue:
        # A worker that reads, and is stopped before it acknowledges.
        queue.get(timeout=30)
        for _ in range(3):
            resend_vanished(sqlite_database, broker)
        assert len(dispatched(sqlite_database)) == 1


def test_a_claimed_bundle_needs_no_message(sqlite_database: Database, broker: Broker, settings: Settings) -> None:
    worker = a_worker(sqlite_database)
    _, ids = a_batch(sqlite_database)
    top_up(sqlite_database, broker, settings)
    claim(sqlite_database, ids, worker)
    for _ in range(3):
        resend_vanished(sqlite_database, broker)
    assert {a_job(sqlite_database, job_id).state for job_id in ids} == {"running"}


def test_what_somebody_else_put_into_redis_stops_nothing(
    sqlite_database: Database, broker: Broker, settings: Settings, server: SocketRedis
) -> None:
    a_worker(sqlite_database)
    a_batch(sqlite_database)
    top_up(sqlite_database, broker, settings)
    with server.client() as client:
        strange = ("", "not json", "[]", "{}", "null", '{"headers": null}', '{"headers": {}}', "\udcff", "[" * 100_000)
        for text in strange:
            client.lpush(CPU, text.encode("utf-8", "surrogateescape"))
            client.hset("unacked", text.encode("utf-8", "surrogateescape") or b"-", text.encode("utf-8", "replace"))
    for _ in range(3):
        resend_vanished(sqlite_database, broker)
    assert len(dispatched(sqlite_database)) == 1


def test_an_urgent_bundle_is_read_before_one_sent_earlier(
    sqlite_database: Database, broker: Broker, settings: Settings
) -> None:
    from qbatch.scheduler.celery_app import make_app

    a_worker(sqlite_database)
    for priority in (-3, 0, 5, 99):
        a_batch(sqlite_database, bundle(f"/models/{priority}"), priority=priority)
        top_up(sqlite_database, broker, settings)
    with make_app(settings) as app, app.connection_for_read() as connection, connection.SimpleQueue(CPU) as queue:
        read = [queue.get(timeout=30) for _ in range(4)]
        order = [a_job(sqlite_database, message.payload[0][0][0]).priority for message in read]
        for message in read:
            message.ack()
    # Redis has ten levels: what is above or below them shares the last.
    assert order in ([5, 99, 0, -3], [99, 5, 0, -3])


def test_while_redis_is_away_nothing_stays_marked_and_then_it_is_sent(
    sqlite_database: Database, broker: Broker, settings: Settings, server: SocketRedis
) -> None:
    a_worker(sqlite_database)
    a_batch(sqlite_database, bundle("/models/a"), bundle("/models/b"))
    server.stop()
    for _ in range(2):
        with pytest.raises(BrokerUnreachable):
            top_up(sqlite_database, broker, settings)
        assert dispatched(sqlite_database) == {}
    with pytest.raises(BrokerUnreachable):
        broker.message_ids([CPU])
    server.start()
    assert top_up(sqlite_database, broker, settings) == 2
    assert broker.message_ids([CPU]) == dispatched(sqlite_database).keys()


@pytest.mark.parametrize("url", ["redis://:hunter2@127.0.0.1:1/0", "redis+socket://:hunter2@/nowhere/r.sock"])
def test_a_broker_that_does_not_answer_is_named_without_its_password(tmp_path: Path, url: str) -> None:
    settings = Settings(home=tmp_path, storage=tmp_path, cache=tmp_path, broker_url=url)
    broker = Broker(settings)
    with pytest.raises(BrokerUnreachable) as caught:
        broker.ping()
    assert "hunter2" not in str(caught.value)
    with pytest.raises(BrokerUnreachable) as caught:
        broker.send([window.Dispatch(dispatch_id="d", queue=CPU, priority=0, job_ids=(1,), label="")])
    assert "hunter2" not in str(caught.value)
    broker.close()


def test_what_redis_refuses_for_want_of_memory_is_taken_back(
    sqlite_database: Database, broker: Broker, settings: Settings, server: SocketRedis
) -> None:
    a_worker(sqlite_database)
    a_batch(sqlite_database)
    with server.client() as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(BrokerUnreachable):
            top_up(sqlite_database, broker, settings)
        assert dispatched(sqlite_database) == {}
        client.config_set("maxmemory", 0)
    assert top_up(sqlite_database, broker, settings) == 1


# VRAM classes

SMALL, LARGE = queue_of(DeviceKind.CUDA, 24), queue_of(DeviceKind.CUDA, 80)


def of_gpus(model: str, *methods: Method, **needs_gib: int) -> list[NewJob]:
    """Jobs of one model; ``none=40``: its baseline is predicted to need more than 40 GiB."""
    needs = {method: needs_gib[method.name.lower()] * GIB for method in Method if method.name.lower() in needs_gib}
    return bundle(model, *methods, device=DeviceKind.CUDA, needs=needs)


def standing(database: Database) -> dict[int, str]:
    """Each dispatched job's queue."""
    rows = [a_job(database, job_id) for job_id in states(database)]
    return {job.id: job.queue for job in rows if job.queue is not None}


def goes_silent(database: Database, worker_id: int, since_s: float) -> None:
    with database.write() as session:
        session.execute(update(Worker).where(Worker.id == worker_id).values(heartbeat_at=db_now(-since_s)))


def read_by(settings: Settings, memory_gib: float, count: int) -> list[list[int]]:
    """The job ids of the first ``count`` messages that a GPU worker of that memory reads."""
    from qbatch.scheduler.celery_app import make_app

    read: list[list[int]] = []
    with make_app(settings) as app, app.connection_for_read() as connection:
        app.amqp.queues.select(queues_of(DeviceKind.CUDA, int(memory_gib * GIB)))
        with app.amqp.TaskConsumer(connection, on_message=lambda message: read.append(message.payload[0][0])):
            while len(read) < count:
                connection.drain_events(timeout=30)
    return read


def test_each_bundle_stands_where_the_smallest_class_that_holds_it_reads(
    database: Database, broker: Broker, settings: Settings
) -> None:
    a_gpu(database, 22.5)
    a_gpu(database, 79.6)
    _, large = a_batch(database, of_gpus("/large", none=40))
    _, small = a_batch(database, of_gpus("/small", none=10))
    _, unknown = a_batch(database, of_gpus("/unknown"))
    assert top_up(database, broker, settings) == 3
    queues = dict.fromkeys(large, LARGE) | dict.fromkeys([*small, *unknown], SMALL)
    assert standing(database) == queues
    assert broker.message_ids([SMALL, LARGE]) == dispatched(database).keys()


def test_a_larger_gpu_reads_what_needs_it_first_and_then_what_is_smaller(
    database: Database, broker: Broker, settings: Settings
) -> None:
    a_gpu(database, 22.5)
    a_gpu(database, 79.6)
    _, first = a_batch(database, of_gpus("/small", none=10))
    top_up(database, broker, settings)
    _, second = a_batch(database, of_gpus("/large", none=40))
    top_up(database, broker, settings)
    assert read_by(settings, 79.6, count=2) == [second, first]


def test_a_smaller_gpu_does_not_read_what_needs_a_larger(
    database: Database, broker: Broker, settings: Settings
) -> None:
    a_gpu(database, 22.5)
    a_gpu(database, 79.6)
    a_batch(database, of_gpus("/large", none=40))
    _, small = a_batch(database, of_gpus("/small"))
    top_up(database, broker, settings)
    assert read_by(settings, 22.5, count=1) == [small]
    assert list(dispatched(database).values()).count(LARGE) == 1


def test_every_class_has_a_window_for_each_worker_that_reads_it(
    database: Database, broker: Broker, settings: Settings
) -> None:
    a_gpu(database, 24)
    a_gpu(database, 80)
    for n in range(10):
        a_batch(database, of_gpus(f"/large/{n}", Method.NF4, nf4=40))
        a_batch(database, of_gpus(f"/small/{n}", Method.NF4))
    top_up(database, broker, settings)
    queues = list(dispatched(database).values())
    assert (queues.count(LARGE), queues.count(SMALL)) == (4, 8)
    assert top_up(database, broker, settings) == 0, "both are full"


def test_gpus_of_one_size_share_a_queue_whatever_is_predicted(
    database: Database, broker: Broker, settings: Settings
) -> None:
    a_gpu(database, 139.8)
    a_gpu(database, 140.4)
    _, ids = a_batch(database, of_gpus("/a", none=10), of_gpus("/b", none=100), of_gpus("/c"))
    assert top_up(database, broker, settings) == 3
    assert standing(database) == dict.fromkeys(ids, queue_of(DeviceKind.CUDA, 141))


def test_a_baseline_that_no_gpu_is_predicted_to_hold_is_tried_alone(
    database: Database, broker: Broker, settings: Settings
) -> None:
    a_gpu(database, 8)
    a_gpu(database, 24)
    _, (baseline, nf4, int8) = a_batch(database, of_gpus("/a", none=40, int8=20, nf4=10))
    assert top_up(database, broker, settings) == 2
    assert standing(database) == dict.fromkeys((baseline, nf4, int8), SMALL)
    assert read_by(settings, 24, count=2) == [[baseline], [nf4, int8]]


def test_what_a_smaller_class_holds_goes_there_without_the_baseline(
    database: Database, broker: Broker, settings: Settings
) -> None:
    a_gpu(database, 8)
    a_gpu(database, 24)
    _, (baseline, nf4) = a_batch(database, of_gpus("/a", Method.NONE, Method.NF4, none=40))
    assert top_up(database, broker, settings) == 2
    assert standing(database) == {baseline: SMALL, nf4: queue_of(DeviceKind.CUDA, 8)}


def test_a_bundle_that_a_class_holds_stays_whole(database: Database, broker: Broker, settings: Settings) -> None:
    a_gpu(database, 24)
    a_gpu(database, 80)
    _, ids = a_batch(database, of_gpus("/a", none=40, nf4=10))
    assert top_up(database, broker, settings) == 1
    assert standing(database) == dict.fromkeys(ids, LARGE)


def test_what_ran_out_of_memory_goes_to_a_larger_class_its_mates_do_not(
    database: Database, broker: Broker, settings: Settings
) -> None:
    small = a_gpu(database, 24)
    a_gpu(database, 80)
    _, (baseline, *mates) = a_batch(database, bundle("/a", device=DeviceKind.AUTO))
    top_up(database, broker, settings)
    assert standing(database) == dict.fromkeys((baseline, *mates), SMALL)
    (token,) = claim(database, [baseline], small)
    fail(database, token, CudaOom("CUDA out of memory"))
    assert top_up(database, broker, settings) == 1
    assert standing(database) == {baseline: LARGE} | dict.fromkeys(mates, SMALL)


@pytest.mark.parametrize("predicted", [None, 1], ids=["of unknown size", "of a predicted size"])
def test_after_a_loss_a_baseline_goes_before_what_is_compared_with_it(
    database: Database, broker: Broker, settings: Settings, predicted: int | None
) -> None:
    """Alone, as everything that a lost worker had: otherwise the others would find no outputs to be compared with."""
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/a"), bundle("/b", Method.NONE, Method.NF4))
    top_up(database, broker, settings)
    baseline, *mates = ids[:3]
    change_job(database, baseline, above_memory_bytes=predicted)
    claim(database, ids[:3], worker)
    is_lost(database, worker, works_on=baseline)
    assert top_up(database, broker, settings) == 0, "it is not due"
    assert standing(database).keys() == set(ids[3:]), "no other model waits for it"
    change_job(database, baseline, not_before=None)
    assert top_up(database, broker, settings) == 1
    assert standing(database).keys() == {baseline, *ids[3:]}
    (token,) = claim(database, [baseline], worker)
    assert top_up(database, broker, settings) == 0, "it is running"
    succeed(database, token)
    assert top_up(database, broker, settings) == 2
    assert standing(database).keys() >= set(mates)


def test_what_was_handed_back_comes_along_with_its_baseline(
    database: Database, broker: Broker, settings: Settings
) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/a"))
    top_up(database, broker, settings)
    tokens = claim(database, ids, worker)
    with database.write() as session:
        jobs.hand_back(session, tokens)
    assert top_up(database, broker, settings) == 1
    assert standing(database).keys() == set(ids)


def is_lost(database: Database, worker: int, *, works_on: int) -> None:
    change_job(database, works_on, work_started=True)
    with database.write() as session:
        jobs.expire(session, limits=RetryLimits(backoff_s=60.0, max_failures=3), worker_id=worker)


def change_job(database: Database, job_id: int, **values: object) -> None:
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


def test_what_ran_out_of_memory_is_not_sent_to_a_cpu(database: Database, broker: Broker, settings: Settings) -> None:
    small, large = a_gpu(database, 24), a_gpu(database, 80)
    _, (job_id,) = a_batch(database, bundle("/a", Method.NF4, device=DeviceKind.AUTO))
    (token,) = claim(database, [job_id], small)
    fail(database, token, CudaOom("CUDA out of memory"))
    for gpu in (small, large):
        goes_silent(database, gpu, since_s=121)
    a_worker(database, "a CPU")
    assert top_up(database, broker, settings) == 0


def test_when_the_larger_gpu_is_gone_its_bundles_are_tried_on_the_one_left(
    database: Database, broker: Broker, settings: Settings
) -> None:
    a_gpu(database, 24)
    large = a_gpu(database, 80)
    _, (job_id,) = a_batch(database, of_gpus("/a", Method.NF4, nf4=40))
    top_up(database, broker, settings)
    assert standing(database) == {job_id: LARGE}
    goes_silent(database, large, since_s=90)
    assert top_up(database, broker, settings) == 0, "it may be back in a moment"
    goes_silent(database, large, since_s=121)
    assert top_up(database, broker, settings) == 1
    assert standing(database) == {job_id: SMALL}


def test_when_the_larger_gpu_is_gone_what_is_known_to_need_it_fails(
    database: Database, broker: Broker, settings: Settings
) -> None:
    small, large = a_gpu(database, 24), a_gpu(database, 80)
    _, ids = a_batch(database, of_gpus("/a"))
    (token, *_) = claim(database, ids, small)
    fail(database, token, CudaOom("CUDA out of memory"))
    top_up(database, broker, settings)
    assert standing(database) == {ids[0]: LARGE}
    goes_silent(database, large, since_s=121)
    fail_jobs_without_gpu(database, settings)
    top_up(database, broker, settings)
    assert a_job(database, ids[0]).error_message == "needs a GPU of more than 24 GiB, and no live worker has one"
    assert {state for job_id, state in states(database).items() if job_id != ids[0]} == {"running"}


def test_jobs_for_any_device_leave_the_queue_of_a_gpu_that_is_gone(
    database: Database, broker: Broker, settings: Settings
) -> None:
    gpu = a_gpu(database, 24)
    a_batch(database, bundle("/a", device=DeviceKind.AUTO))
    top_up(database, broker, settings)
    assert set(dispatched(database).values()) == {SMALL}
    a_worker(database)
    goes_silent(database, gpu, since_s=121)
    assert top_up(database, broker, settings) == 1
    assert set(dispatched(database).values()) == {CPU}


def test_a_job_known_to_need_more_than_there_is_is_sent_nowhere(
    database: Database, broker: Broker, settings: Settings
) -> None:
    small = a_gpu(database, 24)
    _, (oom, mate) = a_batch(database, of_gpus("/a", Method.NONE, Method.NF4))
    (token, _) = claim(database, [oom, mate], small)
    with database.write() as session:
        jobs.hand_back(session, [(mate, 1)])
    fail(database, token, CudaOom("CUDA out of memory"))
    with database.write() as session:
        assert jobs.retry(session, job_ids=[oom]) == [oom]
    assert top_up(database, broker, settings) == 1
    assert standing(database) == {mate: SMALL}
