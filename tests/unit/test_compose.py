"""docker-compose.yml, the Dockerfile and the image's contents fit today's qbatch."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from qbatch.core.settings import Settings
from qbatch.scheduler.private_redis import redis_server_path
from tests.command_line import parse_qbatch

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
QBATCH_SERVICES = sorted(name for name, service in SERVICES.items() if service.get("image") == "qbatch")
_PASSWORD = "0123abcd"  # noqa: S105


def _substituted(text: str, variables: dict[str, str]) -> str:
    """``${NAME:?…}`` and ``${NAME:-…}`` as compose fills them in; KeyError for a required one that is missing."""

    def value(match: re.Match[str]) -> str:
        name, operator, default = match.groups()
        return variables[name] if operator == ":?" else variables.get(name) or default

    return re.sub(r"\$\{(\w+)(:\?|:-)([^}]*)\}", value, text)


def test_the_services_are_those_promised() -> None:
    assert set(SERVICES) == {"redis", "postgres", "migrate", "scheduler", "worker", "worker-cpu", "flower"}
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {"worker": ["gpu"], "worker-cpu": ["cpu"]}


@pytest.mark.parametrize("name", QBATCH_SERVICES)
def test_every_command_is_one_that_qbatch_parses(name: str) -> None:
    program, *arguments = SERVICES[name]["command"]
    assert program == "qbatch"
    parse_qbatch(arguments)


@pytest.mark.parametrize("name", QBATCH_SERVICES)
def test_qbatch_reads_the_environment_it_is_given(name: str) -> None:
    secrets = {"REDIS_PASSWORD": "r", "POSTGRES_PASSWORD": "p", "FLOWER_USER": "u", "FLOWER_PASSWORD": "f"}
    environ = {key: _substituted(value, secrets) for key, value in SERVICES[name]["environment"].items()}
    settings = Settings.from_env(environ)
    assert settings.broker_url == "redis://:r@redis:6379/0"
    assert settings.sqlalchemy_url == "postgresql+psycopg://qbatch:p@postgres:5432/qbatch"
    assert settings.storage == Path("/storage")
    assert not settings.is_one_machine
    assert settings.allowed_roots == (Path("/models"),)
    assert settings.trust_remote_code == frozenset()
    assert "${MODELS_DIR:-./models}:/models:ro" in SERVICES[name]["volumes"]
    assert settings.flower_auth == ("u:f" if name == "flower" else None)


@pytest.mark.parametrize(
    ("service", "variable"),
    [
        ("redis", "REDIS_PASSWORD"),
        ("postgres", "POSTGRES_PASSWORD"),
        ("flower", "FLOWER_USER"),
        ("flower", "FLOWER_PASSWORD"),
        *((name, variable) for name in QBATCH_SERVICES for variable in ("REDIS_PASSWORD", "POSTGRES_PASSWORD")),
    ],
)
def test_a_service_refuses_to_start_without_its_credentials(service: str, variable: str) -> None:
    assert f"${{{variable}:?" in str(SERVICES[service]["environment"])


def test_no_credential_has_a_default() -> None:
    assert not re.search(r"(PASSWORD|USER):?-", (ROOT / "docker-compose.yml").read_text())


def test_flower_alone_is_published_and_on_loopback_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"flower": ["127.0.0.1:5555:5555"]}
    assert all("network_mode" not in service for service in SERVICES.values())


def test_another_host_is_told_where_redis_and_postgresql_are() -> None:
    variables = {"REDIS_PASSWORD": "r", "POSTGRES_PASSWORD": "p", "HEAD_HOST": "10.0.0.1"}
    environ = {key: _substituted(value, variables) for key, value in SERVICES["worker"]["environment"].items()}
    settings = Settings.from_env(environ)
    assert settings.broker_url == "redis://:r@10.0.0.1:6379/0"
    assert settings.sqlalchemy_url == "postgresql+psycopg://qbatch:p@10.0.0.1:5432/qbatch"
    head: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.head.yml").read_text())["services"]
    published = {name: service["ports"] for name, service in head.items()}
    address = "${PRIVATE_ADDRESS:?set it in .env}"
    assert published == {"redis": [f"{address}:6379:6379"], "postgres": [f"{address}:5432:5432"]}


@pytest.mark.parametrize("name", QBATCH_SERVICES)
def test_every_setting_reaches_every_service(name: str) -> None:
    """But those of places within the container, and the password of Flower, which Flower alone knows."""
    variables = {f"QBATCH_{field.name.upper()}" for field in dataclasses.fields(Settings)} - {"QBATCH_RUNTIME_DIR"}
    fixed = {"QBATCH_HOME", "QBATCH_CACHE", *(() if name == "flower" else ("QBATCH_FLOWER_AUTH",))}
    assert {key for key in SERVICES[name]["environment"] if key.startswith("QBATCH_")} == variables - fixed


def test_a_given_setting_is_passed_on() -> None:
    given = {"REDIS_PASSWORD": "r", "POSTGRES_PASSWORD": "p", "QBATCH_LEASE_S": "90", "QBATCH_WINDOW": "8"}
    environ = {key: _substituted(value, given) for key, value in SERVICES["scheduler"]["environment"].items()}
    settings = Settings.from_env(environ)
    assert (settings.lease_s, settings.window, settings.scan_s) == (90.0, 8, 10.0)


@pytest.mark.parametrize("name", QBATCH_SERVICES)
def test_the_storage_is_a_folder_of_the_host_that_must_exist(name: str) -> None:
    (storage,) = [volume for volume in SERVICES[name]["volumes"] if isinstance(volume, dict)]
    assert storage == {
        "type": "bind",
        "source": "${STORAGE_DIR:-./storage}",
        "target": "/storage",
        "bind": {"create_host_path": False},
    }


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"migrate"}))
def test_every_service_that_stays_has_a_health_check(name: str) -> None:
    program, *arguments = SERVICES[name]["healthcheck"]["test"]
    assert program in ("CMD", "CMD-SHELL")
    if name in QBATCH_SERVICES:
        assert arguments == ["qbatch", "healthcheck", name.removesuffix("-cpu")]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_the_log_of_a_container_is_bounded(name: str) -> None:
    assert SERVICES[name]["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "5"}}


def test_the_image_has_what_tasks_need() -> None:
    """The line of the Dockerfile that lists the requirements, run by the shell as Docker would."""
    dockerfile = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    (listing,) = re.findall(r"^RUN (python -c .*?)\s+> requirements.txt", dockerfile, flags=re.MULTILINE)
    argv = ["sh", "-c", listing.replace("python", sys.executable, 1)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert done.stdout.splitlines() == [*project["dependencies"], *project["optional-dependencies"]["eval"]]


def test_the_hub_token_reaches_the_workers_alone() -> None:
    holders = {name for name, service in SERVICES.items() if "HF_TOKEN" in service["environment"]}
    assert holders == {"worker", "worker-cpu"}


def test_the_gpu_worker_alone_reserves_gpus() -> None:
    reserved = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in SERVICES.items()
        if "deploy" in service
    }
    assert reserved == {"worker": [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_has_no_root_rights_and_bounds_on_memory_and_processes(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode"}
    assert service.get("user", "qbatch") in ("redis", "postgres", "qbatch"), "nobody begins as root"
    assert ("user" in service) == (name not in QBATCH_SERVICES)
    assert re.fullmatch(r"\d+g", _substituted(service["mem_limit"], {}))
    assert 0 < service["pids_limit"] <= 16384


def test_every_image_can_be_pinned_to_a_digest() -> None:
    images = {service["image"] for service in SERVICES.values()} | {
        service["build"]["args"]["PYTHON_IMAGE"] for service in SERVICES.values() if "build" in service
    }
    pinned = {name: f"{name.lower()}@sha256:0" for name in ("REDIS_IMAGE", "POSTGRES_IMAGE", "PYTHON_IMAGE")}
    assert {_substituted(image, pinned) for image in images} == {"qbatch", *pinned.values()}
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)", dockerfile, flags=re.MULTILINE) == ["${PYTHON_IMAGE}"]
    assert re.findall(r"^ARG PYTHON_IMAGE=(\S+)", dockerfile, flags=re.MULTILINE) == [
        _substituted("${PYTHON_IMAGE:-python:3.12-slim}", {})
    ]
    assert "sha256" in (ROOT / ".env.example").read_text()


def test_nothing_works_before_the_schema_is_there() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in set(QBATCH_SERVICES) - {"migrate"}:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert SERVICES[name]["depends_on"]["redis"] == {"condition": "service_healthy"}


def test_the_example_environment_names_every_variable_and_holds_no_secret() -> None:
    files = (ROOT / "docker-compose.yml", ROOT / "docker-compose.head.yml")
    named = {name for file in files for name in re.findall(r"\$\{(\w+)", file.read_text())}
    lines = (ROOT / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert set(example) == named
    assert set(example.values()) == {""}


@pytest.fixture
def compose_redis(tmp_path: Path) -> Iterator[str]:
    """The command of the redis service, run by this machine's redis-server on a socket."""
    socket = tmp_path / "redis.sock"
    # A link of its own: the binary may stand in a wheel, on nobody's PATH.
    (tmp_path / "redis-server").symlink_to(redis_server_path())
    script: str = SERVICES["redis"]["command"][2].replace("$$", "$")
    script = script.replace("dir /data", f"dir {tmp_path}\nport 0\nunixsocket {socket}")
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REDIS_PASSWORD": _PASSWORD}
    with subprocess.Popen(["sh", "-c", script], env=environ, stdout=subprocess.DEVNULL) as server:
        try:
            deadline_s = time.monotonic() + 60
            while not socket.exists():
                assert server.poll() is None, "redis-server did not take its configuration"
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
            yield str(socket)
        finally:
            # No shell stands between: a stop reaches Redis itself, which then writes its file out.
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 0


def test_redis_wants_its_password_keeps_its_file_and_evicts_nothing(compose_redis: str) -> None:
    with redis.Redis(unix_socket_path=compose_redis) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with redis.Redis(unix_socket_path=compose_redis, password=_PASSWORD) as client:
        assert client.ping()
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_the_image_runs_as_a_user_without_rights() -> None:
    users = re.findall(r"^USER (\S+)", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert users == ["qbatch"]


def test_the_image_gets_everything_that_the_project_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    links = {path.readlink().name for path in (ROOT / "src" / "qbatch").iterdir() if path.is_symlink()}
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    needed = links | {"src", "pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE"}
    assert let_through == needed
