"""The environment is read once, whole, and every mistake in it is named."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.errors import UsageError
from qbatch.core.settings import Settings
from qbatch.scheduler.celery_app import make_app

SECRET = "hunter2"  # noqa: S105


def read(**environ: str) -> Settings:
    return Settings.from_env({f"QBATCH_{name}": value for name, value in environ.items()})


def test_nothing_need_be_set(tmp_path: Path) -> None:
    settings = read(HOME=str(tmp_path))
    assert settings.is_embedded
    assert settings.is_one_machine
    assert settings.sqlalchemy_url == f"sqlite:///{tmp_path}/qbatch.db"
    assert settings.celery_broker_url == f"redis+socket://{settings.socket}?virtual_host=0"
    assert settings.redis_url == f"unix://{settings.socket}?db=0"
    assert (settings.storage, settings.cache) == (tmp_path / "storage", tmp_path / "cache")
    assert settings.spool.parent == tmp_path / "spool"


def test_what_belongs_to_one_database_stands_apart_from_others(tmp_path: Path) -> None:
    home = str(tmp_path)
    databases = (None, "postgresql://qbatch:secret@db/one", "postgresql://qbatch:secret@db/two")
    several = [read(HOME=home) if url is None else read(HOME=home, DATABASE_URL=url) for url in databases]
    assert len({settings.spool for settings in several}) == 3
    assert several[0].logs_of("one") != several[0].logs_of("another")
    changed = read(HOME=home, DATABASE_URL="postgresql://qbatch:another@db/one")
    assert changed.spool == several[1].spool, "whoever signs in"


def test_a_home_is_the_same_whichever_way_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to("home")
    real, linked = read(HOME=str(tmp_path / "home")), read(HOME=str(tmp_path / "link"))
    assert real == linked
    assert (real.socket_dir, real.spool, real.staging) == (linked.socket_dir, linked.spool, linked.staging)


def test_a_long_home_has_a_socket_path_that_the_kernel_takes() -> None:
    settings = read(HOME="/h" + "o" * 300)
    assert len(f"{settings.socket_dir}/redis.sock") < 100
    assert settings.socket == settings.socket_dir / "redis.sock", "no link could lead there"
    assert settings.socket_dir != read(HOME="/other").socket_dir


@pytest.mark.parametrize("home", ["/a b", "/50%", "/a#b", "/ä"])
def test_a_home_that_a_url_would_spell_otherwise_has_its_socket_elsewhere(home: str) -> None:
    settings = read(HOME=home)
    assert settings.redis_url == f"unix:///tmp/{settings.socket_dir.name}/redis.sock?db=0"


def test_sockets_lie_in_the_runtime_directory_where_that_is_the_users_own(runtime_dir: Path) -> None:
    environ = {"QBATCH_HOME": "/h", "XDG_RUNTIME_DIR": str(runtime_dir)}
    in_tmp = read(HOME="/h").socket_dir
    assert Settings.from_env(environ).socket_dir == runtime_dir / in_tmp.name
    assert Settings.from_env(environ).socket == read(HOME="/h").socket, "clients of any environment"
    long_home = environ | {"QBATCH_HOME": "/h" + "o" * 300}
    assert Settings.from_env(long_home).socket_dir.parent == in_tmp.parent, "clients have no link to follow"
    runtime_dir.chmod(0o755)
    assert Settings.from_env(environ).socket_dir == in_tmp, "others may look in"
    runtime_dir.rmdir()
    assert Settings.from_env(environ).socket_dir == in_tmp, "its user has logged out"
    assert Settings.from_env(environ | {"XDG_RUNTIME_DIR": "run"}).socket_dir == in_tmp, "relative"


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("HOME", "/h", "home", Path("/h")),
        ("STORAGE", "/s", "storage", Path("/s")),
        ("CACHE", "/c", "cache", Path("/c")),
        ("CACHE_BYTES", "5", "cache_bytes", 5),
        ("BROKER_URL", "redis://r/1", "broker_url", "redis://r/1"),
        ("DATABASE_URL", "postgresql://d/q", "database_url", "postgresql://d/q"),
        ("LEASE_S", "45.5", "lease_s", 45.5),
        ("HEARTBEAT_S", "7", "heartbeat_s", 7.0),
        ("SCAN_S", "2", "scan_s", 2.0),
        ("WINDOW", "9", "window", 9),
        ("BACKOFF_S", "0.5", "backoff_s", 0.5),
        ("MAX_FAILURES", "1", "max_failures", 1),
        ("FLOWER_AUTH", "me:pw", "flower_auth", "me:pw"),
        ("MODEL_ROOTS", "/a:/b/../c:", "model_roots", (Path("/a"), Path("/b/../c"))),
        ("TRUST_REMOTE_CODE", " org/a,/m/b/, ,c", "trust_remote_code", frozenset({"org/a", "/m/b", "c"})),
    ],
)
def test_each_variable_sets_its_field(variable: str, text: str, field: str, value: Any) -> None:
    assert getattr(read(**{variable: text}), field) == value


@pytest.mark.parametrize(
    "variable", ["HOME", "STORAGE", "CACHE", "BROKER_URL", "DATABASE_URL", "FLOWER_AUTH", "LEASE_S", "WINDOW"]
)
def test_an_empty_variable_is_one_that_is_not_set(variable: str) -> None:
    assert read(**{variable: ""}) == read()


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf", "1e999", "1,5"])
@pytest.mark.parametrize("variable", ["LEASE_S", "HEARTBEAT_S", "SCAN_S", "BACKOFF_S"])
def test_a_duration_that_cannot_be_is_named(variable: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"QBATCH_{variable}"):
        read(**{variable: text})


@pytest.mark.parametrize("text", ["x", "0", "-1", "1.5", "nan"])
@pytest.mark.parametrize("variable", ["CACHE_BYTES", "WINDOW", "MAX_FAILURES"])
def test_a_count_that_cannot_be_is_named(variable: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"QBATCH_{variable}"):
        read(**{variable: text})


def test_a_home_that_no_url_can_name_is_refused() -> None:
    with pytest.raises(UsageError, match="QBATCH_HOME"):
        Settings.from_env({"QBATCH_HOME": "/srv/what?"})


def test_a_lease_outlives_two_heartbeats() -> None:
    with pytest.raises(UsageError, match="QBATCH_LEASE_S"):
        read(LEASE_S="29", HEARTBEAT_S="15")
    assert read(LEASE_S="30", HEARTBEAT_S="15").lease_s == 30


@pytest.mark.parametrize(
    ("broker", "redis_url", "one_machine"),
    [
        ("redis://redis:6379/0", "redis://redis:6379/0", False),
        ("rediss://r.example:6380/1", "rediss://r.example:6380/1", False),
        ("redis://", "redis://", True),
        ("redis://localhost/0", "redis://localhost/0", True),
        ("redis://127.0.0.1:7/0", "redis://127.0.0.1:7/0", True),
        ("redis://[::1]:7/0", "redis://[::1]:7/0", True),
        ("redis+socket:///run/r.sock?virtual_host=3", "unix:///run/r.sock?db=3", True),
    ],
)
def test_a_broker_is_spelled_for_celery_and_for_redis(broker: str, redis_url: str, one_machine: bool) -> None:
    settings = read(BROKER_URL=broker)
    assert not settings.is_embedded
    assert settings.celery_broker_url == broker + ("?ssl_cert_reqs=required" if broker.startswith("rediss") else "")
    assert settings.redis_url == redis_url
    assert settings.is_one_machine is one_machine


@pytest.mark.parametrize(
    "broker",
    [
        f"amqp://u:{SECRET}@rabbit//",
        f"u:{SECRET}@redis:6379",
        "redis",
        f"redis://:{SECRET}@redis:port/0",
        f"redis://:{SECRET}@redis:99999/0",
        "unix:///run/r.sock",
        "redis://[::1/0",
        f"redis://redis:6379/0?password={SECRET}",
        f"redis+socket:///run/r.sock?virtual_host=0&password={SECRET}",
    ],
)
def test_an_unknown_broker_is_refused_without_its_password(broker: str) -> None:
    with pytest.raises(UsageError, match="QBATCH_BROKER_URL") as caught:
        read(BROKER_URL=broker)
    assert SECRET not in str(caught.value)


def test_no_password_is_shown() -> None:
    settings = read(
        BROKER_URL=f"redis://:{SECRET}@r/0", DATABASE_URL=f"postgresql://u:{SECRET}@d/q", FLOWER_AUTH=f"me:{SECRET}"
    )
    assert SECRET not in repr(settings)


@pytest.mark.parametrize(
    ("broker", "roots", "allowed"),
    [
        ("", "", None),
        ("redis://localhost/0", "", None),
        ("redis+socket:///run/r.sock?virtual_host=3", "", None),
        ("redis://redis/0", "", ()),
        ("redis://redis/0", "/models:/more", (Path("/models"), Path("/more"))),
        ("", "/models", (Path("/models"),)),
        ("", ":", ()),
    ],
)
def test_any_folder_is_taken_while_all_workers_are_on_this_host(
    broker: str, roots: str, allowed: tuple[Path, ...] | None
) -> None:
    assert read(BROKER_URL=broker, MODEL_ROOTS=roots).allowed_roots == allowed


def test_no_model_s_code_is_trusted_unless_it_is_named() -> None:
    assert read().trust_remote_code == read(TRUST_REMOTE_CODE="").trust_remote_code == frozenset()


@pytest.mark.parametrize(
    ("query", "verifies"),
    [("", ssl.CERT_REQUIRED), ("?ssl_ca_certs=ca.pem", ssl.CERT_REQUIRED), ("?ssl_cert_reqs=none", ssl.CERT_NONE)],
)
def test_celery_tells_no_broker_with_a_strangers_certificate_the_password(query: str, verifies: ssl.VerifyMode) -> None:
    app = make_app(read(BROKER_URL=f"rediss://:secret@r.example:6380/1{query}"))
    for connection in (app.connection_for_read(), app.connection_for_write()):
        assert connection.ssl["ssl_cert_reqs"] == verifies


@pytest.mark.parametrize("variable", ["CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"])
def test_no_variable_of_celerys_leads_to_another_broker(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "redis://elsewhere:6379/0")
    app = make_app(read(BROKER_URL="redis://ours:6379/0"))
    assert {app.conf.broker_url, app.conf.broker_read_url, app.conf.broker_write_url} == {"redis://ours:6379/0"}
