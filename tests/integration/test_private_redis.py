"""The embedded Redis is where its clients look for it, whatever becomes of the folder that its socket lies in."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qbatch.core.errors import BrokerUnreachable, StorageUnavailable
from qbatch.core.settings import Settings
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.celery_app import make_app
from qbatch.scheduler.local_stack import prepare_home
from qbatch.scheduler.private_redis import PrivateRedis

Start = Callable[..., PrivateRedis]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"QBATCH_HOME": str(tmp_path / "home")}


@pytest.fixture
def start(environ: dict[str, str]) -> Iterator[Start]:
    """Starts a Redis with some environment."""
    started: list[PrivateRedis] = []

    def make(**more: str) -> PrivateRedis:
        settings = Settings.from_env(environ | more)
        prepare_home(settings)
        started.append(PrivateRedis(settings, environ=os.environ))
        started[-1].start()
        return started[-1]

    yield make
    for one in started:
        one.stop()


def answers(environ: dict[str, str]) -> bool:
    """Whether a new client reaches it, by what its own environment says."""
    broker = Broker(Settings.from_env(environ))
    try:
        broker.ping()
    except BrokerUnreachable:
        return False
    finally:
        broker.close()
    return True


def supervise_until(one: PrivateRedis, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        one.supervise()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_redis_is_reached_again_after_its_folder_was_deleted(start: Start, environ: dict[str, str]) -> None:
    one = start()
    settings = Settings.from_env(environ)
    app = make_app(settings)
    with app.connection_for_read() as connected:
        connected.ensure_connection(max_retries=1)
    shutil.rmtree(settings.socket_dir)
    assert not answers(environ)
    supervise_until(one, lambda: answers(environ))
    with app.connection_for_read() as connected:
        connected.ensure_connection(max_retries=1)
    assert settings.socket.resolve() == settings.socket_dir / "redis.sock"


def test_redis_restarts_when_folder_and_process_are_gone(start: Start, environ: dict[str, str]) -> None:
    one = start()
    pid = one.pid
    assert pid is not None
    shutil.rmtree(Settings.from_env(environ).socket_dir)
    os.kill(pid, signal.SIGKILL)
    supervise_until(one, lambda: answers(environ))
    assert one.pid != pid


def test_a_redis_that_hangs_is_restarted(start: Start, environ: dict[str, str]) -> None:
    one = start()
    pid = one.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    supervise_until(one, lambda: one.pid != pid and answers(environ))


def test_a_redis_that_answers_is_left_alone(start: Start, environ: dict[str, str]) -> None:
    one = start()
    pid, until = one.pid, time.monotonic() + 5.0
    supervise_until(one, lambda: time.monotonic() > until)
    assert one.pid == pid
    assert answers(environ)


def test_clients_with_another_environment_find_the_socket(
    start: Start, environ: dict[str, str], runtime_dir: Path
) -> None:
    one = start(XDG_RUNTIME_DIR=str(runtime_dir))
    settings = Settings.from_env(environ)
    assert settings.socket.resolve().parent.parent == runtime_dir
    assert not settings.socket_dir.exists(), "nothing in /tmp"
    assert answers(environ), "as cron, which has no XDG_RUNTIME_DIR"
    one.stop()
    assert list(runtime_dir.iterdir()) == []
    assert not settings.socket_link.is_symlink()


def test_redis_survives_a_deleted_runtime_directory(start: Start, environ: dict[str, str], runtime_dir: Path) -> None:
    one = start(XDG_RUNTIME_DIR=str(runtime_dir))
    shutil.rmtree(runtime_dir)
    supervise_until(one, lambda: answers(environ))
    settings = Settings.from_env(environ)
    assert settings.socket.resolve().parent == settings.socket_dir
    one.stop()
    assert not settings.socket_dir.exists()


def test_a_foreign_folder_in_its_place_is_reported(
    start: Start, environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    one = start()
    place = Settings.from_env(environ).socket_dir
    place.rename(place.with_name(f"{place.name}-ours"))
    place.mkdir()
    place.chmod(0o777)
    try:
        supervise_until(one, lambda: "is open to others" in caplog.text)
        assert f"Redis cannot start: {place} is open to others (mode 0777)" in caplog.text
        with pytest.raises(StorageUnavailable, match="not a private directory"):
            prepare_home(Settings.from_env(environ))
    finally:
        place.rmdir()
        shutil.rmtree(place.with_name(f"{place.name}-ours"))
    supervise_until(one, lambda: answers(environ))
