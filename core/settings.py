"""What the environment says, read once at each entry point and passed down."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from qbatch.core.byte_units import GIB
from qbatch.core.errors import UsageError
from qbatch.core.private_folder import is_runtime_dir

# A URL without a host names a socket, or Redis' default: localhost.
_LOCAL_HOSTS = frozenset({None, "localhost", "127.0.0.1", "::1"})
_BROKER_SCHEMES = ("redis", "rediss", "redis+socket")
# Of a socket's path: the kernel takes about 100 bytes, and a URL must say it as it is.
_LONGEST_SOCKET = 100
_PLAIN_PATH = re.compile(r"[A-Za-z0-9._/-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every QBATCH_* variable: ``lease_s`` is QBATCH_LEASE_S. Durations in seconds, sizes in bytes.

    ``home`` holds what is this machine's own: logs of the stack, the spool, and by default everything else.
    ``storage`` is shared by all workers; ``cache`` keeps at most ``cache_bytes`` of fetched sources on each machine.
    ``broker_url`` and ``database_url`` None mean the embedded default: a private Redis and SQLite under ``home``.
    A worker renews its leases of ``lease_s`` every ``heartbeat_s``; the scheduler looks for lost leases and messages
    every ``scan_s``, and keeps ``window`` bundles a live worker in Redis. A failed attempt waits ``backoff_s``, doubled
    each time, until ``max_failures``. ``time_limit_s`` is the working time of a job that is submitted without a limit
    of its own. ``flower_auth`` is ``user:password``. ``model_roots`` are the folders that sources may lie in (see
    ``allowed_roots``); ``trust_remote_code`` names the models (hub ids, absolute folders) whose own code this machine's
    workers run. ``runtime_dir`` is XDG_RUNTIME_DIR.
    """

    home: Path
    storage: Path
    cache: Path
    cache_bytes: int = 200 * GIB
    broker_url: str | None = field(default=None, repr=False)
    database_url: str | None = field(default=None, repr=False)
    lease_s: float = 60.0
    heartbeat_s: float = 15.0
    scan_s: float = 10.0
    window: int = 4
    backoff_s: float = 10.0
    max_failures: int = 3
    time_limit_s: float = 86_400.0
    flower_auth: str | None = field(default=None, repr=False)
    model_roots: tuple[Path, ...] | None = None
    trust_remote_code: frozenset[str] = frozenset()
    runtime_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.heartbeat_s * 2 > self.lease_s:
            raise UsageError(f"a lease of {self.lease_s} s does not outlive two heartbeats of {self.heartbeat_s} s")
        if self.window < 1 or self.max_failures < 1:
            raise UsageError("QBATCH_WINDOW and QBATCH_MAX_FAILURES must be at least 1")
        if self.broker_url is not None and not _is_redis(self.broker_url):
            # Unquoted: it may carry a password.
            raise UsageError("QBATCH_BROKER_URL is not redis://host:port/db, rediss://… or redis+socket:///path")
        if self.broker_url is not None and "password" in parse_qs(urlsplit(self.broker_url).query):
            # Those who log a URL hide the password before the @, and no other.
            raise UsageError("QBATCH_BROKER_URL has its password among the options: write redis://:password@host")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """Raises UsageError, naming the variable, where a value cannot be read."""
        # Links followed: the socket, the spool and the database have their names from it, whichever way it was reached.
        home = Path(environ.get("QBATCH_HOME") or "~/.qbatch").expanduser().resolve()
        if "?" in str(home):
            raise UsageError("QBATCH_HOME must not hold a '?': in the database's URL it would end the path")
        kinds: dict[str, type[int] | type[float]] = {
            "cache_bytes": int,
            "lease_s": float,
            "heartbeat_s": float,
            "scan_s": float,
            "window": int,
            "backoff_s": float,
            "max_failures": int,
            "time_limit_s": float,
        }
        numbers: dict[str, Any] = {
            name: _number(environ, name, kind) for name, kind in kinds.items() if environ.get(_variable(name))
        }
        return cls(
            home=home,
            storage=Path(environ.get("QBATCH_STORAGE") or home / "storage").expanduser().absolute(),
            cache=Path(environ.get("QBATCH_CACHE") or home / "cache").expanduser().absolute(),
            broker_url=environ.get("QBATCH_BROKER_URL") or None,
            database_url=environ.get("QBATCH_DATABASE_URL") or None,
            flower_auth=environ.get("QBATCH_FLOWER_AUTH") or None,
            model_roots=_folders(environ.get("QBATCH_MODEL_ROOTS")),
            trust_remote_code=_names(environ.get("QBATCH_TRUST_REMOTE_CODE")),
            runtime_dir=Path(runtime_dir) if (runtime_dir := environ.get("XDG_RUNTIME_DIR")) else None,
            **numbers,
        )

    @property
    def lead_s(self) -> float:
        """How long a scheduler leads without renewing its lead."""
        return 3 * self.scan_s

    @property
    def is_embedded(self) -> bool:
        """Whether the private Redis is the broker."""
        return self.broker_url is None

    @property
    def is_one_machine(self) -> bool:
        """Whether the broker is a socket or loopback, so that every worker shares this file system."""
        return urlsplit(self.celery_broker_url).hostname in _LOCAL_HOSTS

    @property
    def allowed_roots(self) -> tuple[Path, ...] | None:
        """The folders that sources may lie in; None: any that can be read. Without a setting that is what holds while
        all workers are on this machine, and none at all otherwise."""
        if self.model_roots is not None:
            return self.model_roots
        return None if self.is_one_machine else ()

    @property
    def socket_dir(self) -> Path:
        """Where a stack of this environment has its sockets, a 0700 directory: in the user's runtime directory where
        there is one, else in /tmp. Its name is short, since socket paths over about 100 bytes fail."""
        name = f"qbatch-{hashlib.sha256(str(self.home).encode()).hexdigest()[:16]}"
        if self.runtime_dir is not None and self._has_short_home and is_runtime_dir(self.runtime_dir):
            return self.runtime_dir / name
        return Path("/tmp") / name  # noqa: S108

    @property
    def socket_link(self) -> Path:
        """What leads all clients to the directory of the stack that runs, whatever their own environment says."""
        return self.home / "run"

    @property
    def socket(self) -> Path:
        """The embedded Redis as clients find it: through the link, or, for a home whose path is no socket's, in the
        one place that is always the same."""
        return (self.socket_link if self._has_short_home else self.socket_dir) / "redis.sock"

    @property
    def _has_short_home(self) -> bool:
        path = str(self.socket_link / "redis.sock")
        return len(path) <= _LONGEST_SOCKET and _PLAIN_PATH.fullmatch(path) is not None

    @property
    def celery_broker_url(self) -> str:
        """The broker as Celery spells it. By itself it takes any certificate, and tells its owner the password."""
        url = self.broker_url or f"redis+socket://{self.socket}?virtual_host=0"
        query = urlsplit(url).query
        if not url.startswith("rediss:") or "ssl_cert_reqs=" in query:
            return url
        return f"{url}{'&' if query else '?'}ssl_cert_reqs=required"

    @property
    def redis_url(self) -> str:
        """The broker as redis-py spells it."""
        if self.broker_url is None:
            return f"unix://{self.socket}?db=0"
        if self.broker_url.startswith("redis+socket://"):
            return self.broker_url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=")
        return self.broker_url

    @property
    def sqlalchemy_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'qbatch.db'}"

    @property
    def checkpoints(self) -> Path:
        return self.storage / "checkpoints"

    @property
    def staging(self) -> Path:
        return self.storage / ".staging"

    def staging_of(self, database_id: str) -> Path:
        """What belongs to one database stands apart from what belongs to others: their job ids are the same."""
        return self.staging / database_id

    @property
    def logs(self) -> Path:
        """Those of jobs that lie here themselves are of version 0.1.0, of all databases together."""
        return self.storage / "logs"

    def logs_of(self, database_id: str) -> Path:
        """Of one database's jobs: they are named by their ids."""
        return self.logs / database_id

    @property
    def spool(self) -> Path:
        """Where a worker keeps outcomes that the database could not take yet; local to the machine."""
        return self.home / "spool" / self._database_name

    @property
    def _database_name(self) -> str:
        """A home may be told to use one database now and another one later, and their job ids are the same."""
        place = self.sqlalchemy_url.rpartition("@")[2]
        if place.startswith("sqlite:"):
            place += _machine_id()
        return hashlib.sha256(place.encode()).hexdigest()[:8]


@functools.cache
def _machine_id() -> str:
    """systemd's; empty where there is none, as in most containers."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""


def _is_redis(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in _BROKER_SCHEMES and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, or a bracket that is not closed
        return False


def _folders(text: str | None) -> tuple[Path, ...] | None:
    if not text:
        return None
    return tuple(Path(part).expanduser().absolute() for part in text.split(os.pathsep) if part)


def _names(text: str | None) -> frozenset[str]:
    """A comma list of models as jobs name their place: a hub id, or an absolute folder without a slash at its end."""
    names = (part.strip() for part in (text or "").split(","))
    return frozenset(str(Path(name)) if name.startswith("/") else name for name in names if name)


def _variable(name: str) -> str:
    return f"QBATCH_{name.upper()}"


def _number(environ: Mapping[str, str], name: str, kind: type[int] | type[float]) -> int | float:
    text = environ[_variable(name)]
    try:
        value = kind(text)
    except ValueError as error:
        raise UsageError(f"{_variable(name)} is not a number: {text!r}") from error
    if value <= 0 or not math.isfinite(value):
        raise UsageError(f"{_variable(name)} must be above 0 and finite, not {text}")
    return value
