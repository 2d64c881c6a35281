"""A worker that finds no Redis says why and what to do, and goes on once there is one."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from qbatch.core.settings import Settings
from qbatch.scheduler.local_stack import prepare_home
from qbatch.scheduler.private_redis import PrivateRedis
from qbatch.worker.serving.broker_wait import await_broker
from tests.waiting import until


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"QBATCH_HOME": str(tmp_path / "home")})


def test_without_a_stack_it_says_how_to_start_one_and_waits(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=await_broker, args=(settings, stop.wait))
    thread.start()
    until(lambda: "qbatch up" in caplog.text, "the reason")
    assert f"no stack is running with its home in {settings.home}" in caplog.text
    prepare_home(settings)
    redis = PrivateRedis(settings, environ=os.environ)
    redis.start()
    try:
        thread.join(30)
        assert not thread.is_alive()
    finally:
        stop.set()
        redis.stop()
    assert len(caplog.records) == 1, "once a minute is enough"


def test_another_redis_is_named_and_a_stop_ends_the_wait(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    remote = Settings.from_env({"QBATCH_HOME": str(settings.home), "QBATCH_BROKER_URL": "redis://127.0.0.1:1/0"})
    with caplog.at_level(logging.WARNING):
        await_broker(remote, lambda _: True)
    assert "Redis does not answer" in caplog.text
    assert "waiting for it" in caplog.text
