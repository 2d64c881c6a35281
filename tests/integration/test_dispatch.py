"""The window in a real Redis: rows first, messages second, and what vanishes is sent again."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from models_db import window
from models_db.domain import DeviceKind
from models_db.errors import BrokerUnreachable
from models_db.session import Database
from models_db.settings import Settings
from scheduler.broker import Broker
from scheduler.dispatch import top_up
from scheduler.local import redis_server_path
from scheduler.queues import queue_of
from scheduler.reconcile import resend_vanished
from tests.rows import a_batch, a_job, a_worker, bundle, claim

CPU = queue_of(DeviceKind.CPU)


class RedisServer:
    """A real one on a unix socket, that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.socket = folder / "r.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [redis_server_path(), "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir"]
        self._process = subprocess.Popen([*argv, str(self._folder)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._answers():
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.02)

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
            self._process.wait(10)
            self._process = None


@pytest.fixture
def server() -> Iterator[RedisServer]:
    # pytest's own folders are too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="qb-"))
    server = RedisServer(folder)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def settings(server: RedisServer, tmp_path: Path) -> Settings:
    url = f"redis+socket://{server.socket}?virtual_host=0"
    return Settings(home=tmp_path, storage=tmp_path, cache=tmp_path, broker_url=url, window=4)


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    broker = Broker(settings)
    yield broker
    broker.close()


def dispatched(database: Database) -> dict[str, str]:
    with database.read() as session:
        return window.standing(session)


def test_the_window_is_filled_and_its_messages_stand_in_redis(
    sqlite_database: Database, broker: Broker, settings: Settings
) -> None:
    a_worker(sqlite_database)
    a_batch(sqlite_database, *[bundle(f"/models/{n}") for n in range(6)])
    assert top_up(sqlite_database, broker, settings) == 4
    assert top_up(sqlite_database, broker, settings) == 0, "the window is full"
    assert broker.standing([CPU]) == dispatched(sqlite_database).keys()
    assert set(dispatched(sqlite_database).values()) == {CPU}


def test_without_a_live_worker_nothing_is_sent(sqlite_database: Database, broker: Broker, settings: Settings) -> None:
    a_batch(sqlite_database)
    assert top_up(sqlite_database, broker, settings) == 0
    assert broker.standing([CPU]) == frozenset()


def test_after_redis_forgot_everything_it_is_sent_again_at_the_second_scan(
    sqlite_database: Database, broker: Broker, settings: Settings, server: RedisServer
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
    assert broker.standing([CPU]) == dispatched(sqlite_database).keys()
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
    assert len(broker.standing([CPU])) == 1001


def test_a_message_popped_and_not_acknowledged_counts_as_standing(
    sqlite_database: Database, broker: Broker, settings: Settings
) -> None:
    from scheduler.celery_app import make_app

    a_worker(sqlite_database)
    a_batch(sqlite_database)
    top_up(sqlite_database, broker, settings)
    with make_app(settings) as app, app.connection_for_read() as connection, connection.SimpleQueue(CPU) as queue:
        # A worker that reads, and is stopped before it acknowledges.
        queue.get(timeout=5)
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
    sqlite_database: Database, broker: Broker, settings: Settings, server: RedisServer
) -> None:
    a_worker(sqlite_database)
    a_batch(sqlite_database)
    top_up(sqlite_database, broker, settings)
    with server.client() as client:
        for text in ("", "not json", "[]", "{}", "null", '{"headers": null}', '{"headers": {}}', "\udcff"):
            client.lpush(CPU, text.encode("utf-8", "surrogateescape"))
            client.hset("unacked", text.encode("utf-8", "surrogateescape") or b"-", text.encode("utf-8", "replace"))
    for _ in range(3):
        resend_vanished(sqlite_database, broker)
    assert len(dispatched(sqlite_database)) == 1


def test_an_urgent_bundle_is_read_before_one_sent_earlier(
    sqlite_database: Database, broker: Broker, settings: Settings
) -> None:
    from scheduler.celery_app import make_app

    a_worker(sqlite_database)
    for priority in (-3, 0, 5, 99):
        a_batch(sqlite_database, bundle(f"/models/{priority}"), priority=priority)
        top_up(sqlite_database, broker, settings)
    with make_app(settings) as app, app.connection_for_read() as connection, connection.SimpleQueue(CPU) as queue:
        read = [queue.get(timeout=5) for _ in range(4)]
        order = [a_job(sqlite_database, message.payload[0][0][0]).priority for message in read]
        for message in read:
            message.ack()
    # Redis has ten levels: what is above or below them shares the last.
    assert order in ([5, 99, 0, -3], [99, 5, 0, -3])


def test_while_redis_is_away_nothing_stays_marked_and_afterwards_it_is_sent(
    sqlite_database: Database, broker: Broker, settings: Settings, server: RedisServer
) -> None:
    a_worker(sqlite_database)
    a_batch(sqlite_database, bundle("/models/a"), bundle("/models/b"))
    server.stop()
    for _ in range(2):
        with pytest.raises(BrokerUnreachable):
            top_up(sqlite_database, broker, settings)
        assert dispatched(sqlite_database) == {}
    with pytest.raises(BrokerUnreachable):
        broker.standing([CPU])
    server.start()
    assert top_up(sqlite_database, broker, settings) == 2
    assert broker.standing([CPU]) == dispatched(sqlite_database).keys()


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
    sqlite_database: Database, broker: Broker, settings: Settings, server: RedisServer
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
