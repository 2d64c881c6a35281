"""Spread out: a real Redis behind a password, a real PostgreSQL, a scheduler and workers as processes of their own."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import create_engine, text

from qbatch.models_db.listing import list_jobs
from qbatch.scheduler.private_redis import redis_server_path
from tests.acceptance.conftest import Qbatch, command_lines, stop
from tests.waiting import until

PASSWORD = "a-canary-password"  # noqa: S105
# Measured for seconds: what is done to a job while it runs takes a command or two to start.
LONG = ("--new-tokens", "96")


class LoopbackRedis:
    """A Redis of the test's own on loopback, with a password, and AOF only if asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        argv = [redis_server_path(), "--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", PASSWORD]
        argv += ["--dir", str(self._folder), "--save", "", "--maxmemory-policy", "noeviction"]
        self._process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        until(self._answers, "Redis")

    def _answers(self) -> bool:
        with redis.Redis.from_url(self.url) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[LoopbackRedis]:
    server = LoopbackRedis(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def services(qbatch: Qbatch, redis_server: LoopbackRedis, postgresql_url: str) -> Qbatch:
    engine = create_engine(postgresql_url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    qbatch.env |= {
        "QBATCH_BROKER_URL": redis_server.url,
        "QBATCH_DATABASE_URL": postgresql_url,
        "QBATCH_STORAGE": str(qbatch.home.parent / "shared"),
        # Short, so that the losses below are made good within the test.
        "QBATCH_LEASE_S": "12",
        "QBATCH_HEARTBEAT_S": "3",
        "QBATCH_SCAN_S": "1",
    }
    return qbatch


def test_a_batch_on_real_services_survives_the_loss_of_redis(
    services: Qbatch, redis_server: LoopbackRedis, models: Path, model_list: Callable[..., str]
) -> None:
    listed = model_list(models / "llama", models / "bloom")
    assert "qbatch db upgrade" in services("submit", "--models", listed, "--bits", "4", code=3).stderr
    services("db", "upgrade")
    services("db", "upgrade")
    assert services("submit", "--models", listed, "--bits", "4,8", *LONG, "-q").stdout.strip() == "b1"
    assert "QBATCH_BROKER_URL is set" in services("up", code=2).stderr
    scheduler = services.start("scheduler")
    worker = services.start("worker", "--cpu")
    try:
        until(lambda: "running" in services.states(), "running job")
        # Every message is lost while a job runs: the job goes on, and what waited is sent again.
        redis_server.kill()
        assert "when Redis is back" in services("submit", "--models", listed, "--bits", "16").stderr
        redis_server.start()
        services("wait", "b1", "b2", "--timeout", "2m")
    finally:
        codes = stop(worker), stop(scheduler)
    assert codes == (0, 0)
    rows = services.json("results")
    assert len(rows) == 8
    assert {row["state"] for row in rows} == {"succeeded"}
    assert all(job["attempt"] <= 1 for job in services.json("jobs")), "nothing ran twice"
    shared = services.home.parent / "shared"
    assert Path(rows[1]["checkpoint_path"]).is_relative_to(shared)
    assert Path(rows[1]["checkpoint_path"], "qbatch.json").is_file()
    log = services.home.with_suffix(".log").read_text()
    assert PASSWORD not in log
    assert "importing what runners need" in log, "nothing else is said for as long as that takes"
    assert [w["state"] for w in services.json("workers")] == []


def test_a_worker_that_is_killed_loses_nothing(services: Qbatch, models: Path, model_list: Callable[..., str]) -> None:
    services("db", "upgrade")
    scheduler = services.start("scheduler")
    worker = services.start("worker", "--cpu")
    listed = model_list(models / "llama")
    try:
        services("submit", "--models", listed, "--bits", "4,8", *LONG)
        until(lambda: "running" in services.states(), "running job")
        for process in [process for process, words in command_lines(services.home).items() if "serve" in words]:
            process.send_signal(signal.SIGKILL)
        services("wait", "b1", "--timeout", "2m")
    finally:
        codes = stop(worker), stop(scheduler)
    assert codes == (0, 0)
    jobs = services.json("jobs")
    assert {job["state"] for job in jobs} == {"succeeded"}
    assert max(job["attempt"] for job in jobs) == 2
    staging = services.home.parent / "shared" / ".staging"
    assert list(staging.glob("*/*")) == [], "a worker that left took its folder along, and the killed one's"


def test_a_running_job_is_cancelled_and_a_slow_one_runs_out_of_time(
    services: Qbatch, models: Path, model_list: Callable[..., str]
) -> None:
    services("db", "upgrade")
    scheduler = services.start("scheduler")
    worker = services.start("worker", "--cpu")
    listed = model_list(models / "llama")
    try:
        services("submit", "--models", listed, "--bits", "4,8", *LONG)
        until(lambda: "running" in services.states(), "running job")
        services("cancel", "b1")
        services("wait", "b1", code=1)
        services("submit", "--models", listed, "--bits", "16", "--force", "--time-limit", "0.1s")
        services("wait", "b2", "--timeout", "2m", code=1)
    finally:
        stop(worker)
        stop(scheduler)
    (timed_out,) = services.json("results", "--batch", "b2")
    assert (timed_out["error_kind"], timed_out["error_message"]) == ("timeout", "exceeded its time limit of 0.1 s")
    assert [job["attempt"] for job in services.json("jobs", "--batch", "b2")] == [2], "a timeout is tried once more"


def _stages(services: Qbatch) -> set[str | None]:
    return {job["stage"] for job in services.look(list_jobs)}


def test_a_runner_that_is_killed_is_charged_and_its_worker_lives(
    services: Qbatch, models: Path, model_list: Callable[..., str]
) -> None:
    services("db", "upgrade")
    services.env["QBATCH_BACKOFF_S"] = "0.5"
    scheduler = services.start("scheduler")
    worker = services.start("worker", "--cpu")
    listed = model_list(models / "llama")
    try:
        services.wait_for_worker()
        (before,) = services.json("workers")
        services("submit", "--models", listed, "--bits", "4,8", "--force", *LONG)
        # A job is running, and fetching, before its runner is there.
        until(lambda: _stages(services) - {None, "fetching"}, "work")
        for runner in _runners(services):
            runner.kill()
        services("wait", "b1", "--timeout", "2m")
        (after,) = services.json("workers")
    finally:
        codes = stop(worker), stop(scheduler)
    assert codes == (0, 0)
    jobs = services.json("jobs")
    assert {job["state"] for job in jobs} == {"succeeded"}
    assert max(job["attempt"] for job in jobs) == 2
    assert max(job["failures"] for job in jobs) == 1, "what it worked on is charged"
    assert before["worker"] == after["worker"]


def _runners(services: Qbatch) -> list[psutil.Process]:
    """The forkserver's children: the server itself is the Celery worker's child."""
    family = command_lines(services.home)
    forkservers = [process for process, words in family.items() if "forkserver" in " ".join(words)]
    servers = [process for process in forkservers if "serve" in family.get(process.parent(), ())]
    assert len(servers) == 1
    return servers[0].children()
