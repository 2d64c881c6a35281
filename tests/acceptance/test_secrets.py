"""The hub's token and the services' passwords are found nowhere but in the environment that they came from."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from sqlalchemy import create_engine, make_url, text

from qbatch.core.settings import Settings
from tests.acceptance.conftest import QBATCH, Qbatch, command_lines, stop
from tests.acceptance.test_hostile_input import make_own
from tests.acceptance.test_services import PASSWORD, LoopbackRedis
from tests.hub import Hub, serving
from tests.unprivileged import LOOKING_INTO_PROCESSES, without_rights
from tests.waiting import until

TOKEN = "hf_canaryThatNobodyButTheHubMayHear"  # noqa: S105
REDIS_PASSWORD = PASSWORD
POSTGRESQL_PASSWORD = "another-canary-password"  # noqa: S105
SECRETS = (TOKEN, REDIS_PASSWORD, POSTGRESQL_PASSWORD)


def files_that_tell(*folders: Path) -> list[str]:
    """The files below that hold a secret, whatever they are: databases, logs, manifests, caches, names of files too."""
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            found += [f"{secret} in {path}" for secret in SECRETS if secret in path.name or secret.encode() in content]
    return found


def arguments_of(home: Path) -> list[str]:
    """What anyone on the machine may read of the running processes."""
    return [argument for words in command_lines(home).values() for argument in words]


class Eavesdropper:
    """Every command that any client sends to Redis, and what every key held whenever one looked."""

    def __init__(self, url: str) -> None:
        self.heard: list[str] = []
        self._client = redis.Redis.from_url(url)
        self._ended = threading.Event()
        self._monitor = threading.Thread(target=self._listen)

    def __enter__(self) -> Eavesdropper:
        self._monitor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._monitor.join()
        self._client.close()

    def _listen(self) -> None:
        try:
            with self._client.monitor() as monitor:
                while not self._ended.is_set():
                    self.heard.append(str(monitor.next_command()))
        except redis.RedisError:  # Redis ends with the stack
            return

    def look(self) -> None:
        try:
            for key in self._client.scan_iter():
                self.heard.append(f"{key!r} {self._value(key)!r}")
        except redis.RedisError:
            self._ended.set()

    def _value(self, key: bytes) -> object:
        """Not as a dump, which is compressed."""
        match self._client.type(key):
            case b"list":
                return self._client.lrange(key, 0, -1)
            case b"hash":
                return self._client.hgetall(key)
            case b"set":
                return self._client.smembers(key)
            case b"zset":
                return self._client.zrange(key, 0, -1)
            case _:
                return self._client.get(key)

    def all(self) -> str:
        """What was heard, and what of it was in base64, as Celery's bodies are."""
        text = "\n".join(self.heard)
        bodies = (base64.b64decode(body[: len(body) // 4 * 4]) for body in re.findall(r"[A-Za-z0-9+/]{24,}", text))
        return "\n".join([text, *(body.decode("latin-1") for body in bodies)])


@pytest.fixture(scope="module")
def hub(models: Path) -> Iterator[Hub]:
    with serving() as hub:
        hub.token = TOKEN
        for name in ("llama", "bloom", "bert-mlm"):
            hub.publish(f"org/{name}", models / name, gated=True)
        yield hub


def test_the_hub_s_token_stays_in_the_environment(
    qbatch: Qbatch, hub: Hub, model_list: Callable[..., str], tmp_path: Path
) -> None:
    qbatch.env |= {
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "huggingface"),
        "no_proxy": "127.0.0.1",
    }
    listed = model_list("org/llama", "org/bloom", "org/bert-mlm", "org/nothing")
    settings = Settings.from_env(qbatch.environ)
    output = tmp_path / "output"
    run = qbatch.start("run", "--models", listed, "--bits", "4", "--format", "json", log=output)
    until(lambda: settings.socket.exists(), "Redis")
    seen = [*arguments_of(qbatch.home)]
    with Eavesdropper(settings.redis_url) as redis_:
        while run.poll() is None:
            redis_.look()
            seen += arguments_of(qbatch.home)
            with_timeout(run, 1.0)
    assert run.returncode == 1, output.read_text()  # org/nothing is not there
    states = {row["model"]: row["error_kind"] for row in qbatch.json("results")}
    assert states == {"org/llama": None, "org/bloom": None, "org/bert-mlm": None, "org/nothing": "source_not_found"}
    assert any(request.token == TOKEN for request in hub.requests), "the hub heard it"
    heard = redis_.all()
    assert "qbatch.run_bundle" in heard, "messages were heard"
    assert "task-received" in heard, "what Flower is told was heard"
    assert TOKEN not in heard
    assert not [argument for argument in seen if TOKEN in argument]
    assert (qbatch.home / "qbatch.db").stat().st_size > 0
    assert list(qbatch.home.rglob("qbatch.json")), "manifests were written"
    assert files_that_tell(qbatch.home, tmp_path) == []


def with_timeout(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[LoopbackRedis]:
    (tmp_path / "redis").mkdir()
    server = LoopbackRedis(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def services(qbatch: Qbatch, redis_server: LoopbackRedis, postgresql_url: str, tmp_path: Path) -> Qbatch:
    engine = create_engine(postgresql_url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    database = make_url(postgresql_url).set(password=POSTGRESQL_PASSWORD)
    qbatch.env |= {
        "QBATCH_BROKER_URL": redis_server.url,
        "QBATCH_DATABASE_URL": database.render_as_string(hide_password=False),
        "QBATCH_STORAGE": str(tmp_path / "shared"),
        "QBATCH_LEASE_S": "12",
        "QBATCH_HEARTBEAT_S": "3",
        "QBATCH_SCAN_S": "1",
        "QBATCH_FLOWER_AUTH": f"someone:{PASSWORD}",
    }
    return qbatch


@contextmanager
def running(services: Qbatch, output: Path) -> Iterator[None]:
    """A scheduler, a worker and Flower; their output goes to ``output``."""
    commands = (["scheduler"], ["worker", "--cpu"], ["flower", "--port", "0"])
    processes = [services.start(*command, log=output) for command in commands]
    try:
        yield
    finally:
        # Flower does not listen while it waits for Redis.
        flower = processes.pop()
        flower.kill()
        flower.wait()
        codes = [stop(process) for process in reversed(processes)]
        assert codes == [0, 0]


def test_the_services_passwords_reach_no_log_no_row_and_no_argument(
    services: Qbatch,
    redis_server: LoopbackRedis,
    postgresql_url: str,
    models: Path,
    model_list: Callable[..., str],
    tmp_path: Path,
) -> None:
    output = tmp_path / "output"
    listed = model_list(models / "llama")
    services("db", "upgrade")
    with running(services, output):
        services.wait_for_worker()
        services("submit", "--models", listed, "--bits", "4")
        until(lambda: services.states() == {"succeeded"}, "end of the batch")
        seen = arguments_of(services.home)
        redis_server.kill()
        until(lambda: "Cannot connect to" in output.read_text(), "complaint of the worker")
        said = services("submit", "--models", listed, "--bits", "16", "--force").stderr
        until(lambda: "Redis does not answer" in output.read_text(), "complaint of the scheduler")
        redis_server.start()
        assert not [argument for argument in seen if any(secret in argument for secret in SECRETS)]
    assert "Redis does not answer" in said
    assert not any(secret in said for secret in SECRETS)
    assert files_that_tell(tmp_path) == []
    assert not any(secret in _dumped(postgresql_url) for secret in SECRETS)


# What code that a model brings can see of the processes of its user.
_SPY = """
import json, os, pathlib
seen = {{}}
for folder in pathlib.Path("/proc").iterdir():
    if folder.name.isdigit():
        for name in ("environ", "cmdline", "mem"):
            try:
                with (folder / name).open("rb") as file:
                    seen[f"{{folder.name}} {{name}}"] = "" if name == "mem" else file.read().decode("latin-1")
            except OSError:
                pass
pathlib.Path({place!r}).write_text(json.dumps({{"pid": os.getpid(), "environ": dict(os.environ), "seen": seen}}))
"""


def test_a_models_own_code_finds_no_password_in_any_process(
    services: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path
) -> None:
    own = make_own(tmp_path / "own", models / "llama", tmp_path, architectures=["OwnForCausalLM"])
    (own / "modeling_own.py").write_text(
        _SPY.format(place=str(tmp_path / "report")) + (own / "modeling_own.py").read_text()
    )
    services.preexec = without_rights(LOOKING_INTO_PROCESSES)
    services.env |= {
        "QBATCH_MODEL_ROOTS": str(tmp_path),
        "QBATCH_TRUST_REMOTE_CODE": str(own),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_TOKEN": TOKEN,
        "SOMEBODYS_API_KEY": REDIS_PASSWORD,
    }
    services("db", "upgrade")
    with running(services, tmp_path / "output"), _bystander() as bystander:
        services.wait_for_worker()
        services("submit", "--models", model_list(own), "--bits", "16", "--wait", code=None)
        family = {process.pid: words for process, words in command_lines(services.home).items()}
        submitted = services.json("jobs")
    assert [job["state"] for job in submitted] == ["succeeded"]
    report = json.loads((tmp_path / "report").read_text())
    seen: dict[str, str] = report["seen"]
    assert "a-canary" in seen[f"{bystander} environ"], "the spy sees what it may"
    assert f"{bystander} mem" in seen
    hidden = [pid for pid, words in family.items() if not any("multiprocessing" in word for word in words)]
    assert len(hidden) == 4, "the scheduler, the launcher, the worker and Flower"
    assert not [what for pid in hidden for what in (f"{pid} environ", f"{pid} mem") if what in seen]
    for what, told in [*seen.items(), ("its own", json.dumps(report["environ"]))]:
        if what.partition(" ")[0] not in ("its", str(report["pid"]), *map(str, family)):
            continue  # the test's own servers
        assert not [secret for secret in (REDIS_PASSWORD, POSTGRESQL_PASSWORD) if secret in told], what
    assert report["environ"]["HF_TOKEN"] == TOKEN, "it fetches: docs/security.md says so"


@contextmanager
def _bystander() -> Iterator[int]:
    """A process that hides nothing."""
    code = "import time; time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={"SECRET": "a-canary"}, preexec_fn=without_rights(LOOKING_INTO_PROCESSES)
    )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _dumped(url: str) -> str:
    """Every row of every table."""
    engine = create_engine(url)
    with engine.connect() as connection:
        tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
        assert "jobs" in tables
        rows = [str(row) for table in tables for row in connection.execute(text(f'SELECT * FROM "{table}"'))]  # noqa: S608
    engine.dispose()
    return "\n".join(rows)


_BROKERS = [
    f"redis://:{REDIS_PASSWORD}@127.0.0.1:1/0",
    f"redis://someone:{REDIS_PASSWORD}@127.0.0.1:1/0",
    f"rediss://:{REDIS_PASSWORD}@127.0.0.1:1/0",
    f"redis+socket://:{REDIS_PASSWORD}@/nowhere/redis.sock?virtual_host=0",
    f"redis://127.0.0.1:1/0?password={REDIS_PASSWORD}",
    f"redis+socket:///nowhere/redis.sock?virtual_host=0&password={REDIS_PASSWORD}",
    f"redis://:{REDIS_PASSWORD}@127.0.0.1:port/0",
    f"amqp://:{REDIS_PASSWORD}@127.0.0.1:1/0",
]
_DATABASES = [
    f"postgresql://someone:{POSTGRESQL_PASSWORD}@127.0.0.1:1/qbatch",
    f"postgresql+psycopg://127.0.0.1:1/qbatch?user=someone&password={POSTGRESQL_PASSWORD}",
    f"postgresql://someone:{POSTGRESQL_PASSWORD}@127.0.0.1:port/qbatch",
    f"postgresql+nothing://someone:{POSTGRESQL_PASSWORD}@127.0.0.1:1/qbatch",
    f"mysql://someone:{POSTGRESQL_PASSWORD}@127.0.0.1:1/qbatch",
    f"someone:{POSTGRESQL_PASSWORD}@127.0.0.1:1/qbatch",
]


# A worker as Celery runs it, without what a job needs.
_CONSUMER = """
import logging, os
from qbatch.core.settings import Settings
from qbatch.scheduler.celery_app import make_app
logging.basicConfig(level=logging.DEBUG)
make_app(Settings.from_env(os.environ)).Worker(pool="threads", concurrency=1, queues=["q"], loglevel="DEBUG").start()
"""


@pytest.mark.parametrize("broker", _BROKERS)
def test_a_broker_that_does_not_answer_is_named_without_its_password(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path, broker: str
) -> None:
    qbatch.env |= {"QBATCH_BROKER_URL": broker, "QBATCH_MODEL_ROOTS": str(models)}
    done = qbatch("submit", "--models", model_list(models / "llama"), "--bits", "4", code=None)
    _nothing_told(done)
    output = tmp_path / "output"
    _complain(qbatch, output, [sys.executable, "-c", _CONSUMER])
    assert files_that_tell(tmp_path) == []


@pytest.mark.parametrize("database", _DATABASES)
def test_a_database_that_does_not_answer_is_named_without_its_password(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path, database: str
) -> None:
    qbatch.env["QBATCH_DATABASE_URL"] = database
    for command in (
        ["submit", "--models", model_list(models / "llama"), "--bits", "4"],
        ["status"],
        ["db", "upgrade"],
    ):
        done = qbatch(*command, code=None)
        assert done.returncode in (2, 3)
        _nothing_told(done)
    output = tmp_path / "output"
    _complain(qbatch, output, [*QBATCH, "scheduler"])
    assert files_that_tell(tmp_path) == []


def _nothing_told(done: subprocess.CompletedProcess[str]) -> None:
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS), done.stderr


def _complain(qbatch: Qbatch, output: Path, argv: list[str]) -> None:
    """Run a service until it has said that it cannot reach what it needs, or has ended for that reason."""
    before = output.stat().st_size if output.exists() else 0
    with output.open("ab") as log:
        process = subprocess.Popen(argv, env=qbatch.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    signs = ("does not answer", "Cannot connect to")
    try:
        until(
            lambda: process.poll() is not None or any(sign in output.read_text()[before:] for sign in signs),
            "word",
        )
    finally:
        process.kill()
        process.wait()
    assert output.stat().st_size > before, "it said something"
