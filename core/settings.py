"""The settings from the environment, read once at each entry point and passed down."""

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
from qbatch.core.retry_policy import RetryLimits

# A URL without a host means a socket or Redis' default host, localhost.
_LOCAL_HOSTS = frozenset({None, "localhost", "127.0.0.1", "::1"})
_BROKER_SCHEMES = ("redis", "rediss", "redis+socket")
# The limits of a socket path: the kernel accepts about 100 bytes, and a URL must contain it without escapes.
_LONGEST_SOCKET = 100
_PLAIN_PATH = re.compile(r"[A-Za-z0-9._/-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The QBATCH_* variables: ``lease_s`` is QBATCH_LEASE_S, and so on. Durations are in seconds, sizes in bytes.

    ``home`` holds what belongs to this machine: the logs of the stack, the spool, and by default everything else.
    ``storage`` is shared by all workers; ``cache`` keeps at most ``cache_bytes`` of fetched sources on each machine.
    If ``broker_url`` and ``database_url`` are None, the embedded defaults are used: a private Redis, and SQLite under
    ``home``. A worker renews its leases of ``lease_s`` every ``heartbeat_s``. The scheduler looks for lost leases and
    messages every ``scan_s``, and keeps ``window`` bundles per live worker in Redis. A failed attempt is repeated
    after ``backoff_s``, doubled each time, until ``max_failures``. ``time_limit_s`` is the working time of jobs that
    were submitted without a limit of their own. ``flower_auth`` is ``user:password``. ``model_roots`` are the folders
    that sources may be in (see ``allowed_roots``). ``trust_remote_code`` holds the models (hub ids, absolute folders)
    whose own code the workers of this machine may run. ``runtime_dir`` is XDG_RUNTIME_DIR.
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
            raise UsageError(
                f"QBATCH_LEASE_S ({self.lease_s} s) must be at least twice QBATCH_HEARTBEAT_S ({self.heartbeat_s} s)"
            )
        if self.window < 1 or self.max_failures < 1:
            raise UsageError("QBATCH_WINDOW and QBATCH_MAX_FAILURES must be at least 1")
        if self.broker_url is not None and not _is_redis(self.broker_url):
            # The value is not quoted, because it may contain a password.
            raise UsageError("QBATCH_BROKER_URL must be redis://host:port/db, rediss://… or redis+socket:///path")
        if self.broker_url is not None and "password" in parse_qs(urlsplit(self.broker_url).query):
            # Libraries that log a URL hide a password before the @, but not one in the query.
            raise UsageError("QBATCH_BROKER_URL has its password in the query: write redis://:password@host instead")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings. Raises UsageError, naming the variable, if a value is not valid."""
        # Links are resolved, because the names of the socket, the spool and the database derive from this path.
        home = _folder(environ.get("QBATCH_HOME") or "~/.qbatch", "QBATCH_HOME").resolve()
        if "?" in str(home):
            raise UsageError("QBATCH_HOME must not contain a '?': it would end the path in the database URL")
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
            storage=_folder(environ.get("QBATCH_STORAGE") or home / "storage", "QBATCH_STORAGE"),
            cache=_folder(environ.get("QBATCH_CACHE") or home / "cache", "QBATCH_CACHE"),
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
        """How long a scheduler stays the active one without renewing its lease."""
        return 3 * self.scan_s

    @property
    def retry_limits(self) -> RetryLimits:
        return RetryLimits(backoff_s=self.backoff_s, max_failures=self.max_failures)

    @property
    def is_embedded(self) -> bool:
        """Whether the broker is the private Redis."""
        return self.broker_url is None

    @property
    def is_one_machine(self) -> bool:
        """Whether the broker is a socket or loopback, so that every worker shares this file system."""
        return urlsplit(self.celery_broker_url).hostname in _LOCAL_HOSTS

    @property
    def allowed_roots(self) -> tuple[Path, ...] | None:
        """The folders that sources may be in; None allows any readable folder.

        If QBATCH_MODEL_ROOTS is not set, any folder is allowed if all workers run on this machine, and none otherwise.
        """
        if self.model_roots is not None:
            return self.model_roots
        return None if self.is_one_machine else ()

    @property
    def socket_dir(self) -> Path:
        """The 0700 directory for the sockets of a stack started in this environment.

        It is in the user's runtime directory if there is a suitable one, else in /tmp. Its name is short, because
        socket paths of more than about 100 bytes fail.
        """
        name = f"qbatch-{hashlib.sha256(str(self.home).encode()).hexdigest()[:16]}"
        if self.runtime_dir is not None and self._has_short_home and is_runtime_dir(self.runtime_dir):
            return self.runtime_dir / name
        return Path("/tmp") / name  # noqa: S108

    @property
    def socket_link(self) -> Path:
        """A link to the socket directory of the running stack. Clients use it whatever their own environment says."""
        return self.home / "run"

    @property
    def socket(self) -> Path:
        """The socket of the embedded Redis, as clients reach it.

        They use the link, unless the path of the home is not suitable for a socket; then the socket is in /tmp.
        """
        return (self.socket_link if self._has_short_home else self.socket_dir) / "redis.sock"

    @property
    def _has_short_home(self) -> bool:
        path = str(self.socket_link / "redis.sock")
        return len(path) <= _LONGEST_SOCKET and _PLAIN_PATH.fullmatch(path) is not None

    @property
    def celery_broker_url(self) -> str:
        """The broker URL in Celery's form.

        For ``rediss`` it requires a valid certificate. By default Celery accepts any certificate, and would send the
        password to whoever presents one.
        """
        url = self.broker_url or f"redis+socket://{self.socket}?virtual_host=0"
        query = urlsplit(url).query
        if not url.startswith("rediss:") or "ssl_cert_reqs=" in query:
            return url
        return f"{url}{'&' if query else '?'}ssl_cert_reqs=required"

    @property
    def redis_url(self) -> str:
        """The broker URL in redis-py's form."""
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
        """Each database has a staging folder of its own, because different databases use the same job ids."""
        return self.staging / database_id

    @property
    def logs(self) -> Path:
        """The folder of all job logs. Version 0.1.0 wrote the logs of all databases directly into it."""
        return self.storage / "logs"

    def logs_of(self, database_id: str) -> Path:
        """The folder of one database's job logs. Logs are named by job id, which other databases use too."""
        return self.logs / database_id

    @property
    def spool(self) -> Path:
        """Where workers of this machine keep outcomes that the database could not accept yet."""
        return self.home / "spool" / self._database_name

    @property
    def _database_name(self) -> str:
        """A short hash that tells databases apart: one home may be used with several, which use the same job ids."""
        url = self.sqlalchemy_url.rpartition("@")[2]
        if url.startswith("sqlite:"):
            url += _machine_id()
        return hashlib.sha256(url.encode()).hexdigest()[:8]


@functools.cache
def _machine_id() -> str:
    """The machine id of systemd; empty if there is none, as in most containers."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""


def _is_redis(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in _BROKER_SCHEMES and (parts.port is None or parts.port > 0)
    except ValueError:  # the port is not a number, or a bracket is not closed
        return False


def _folders(text: str | None) -> tuple[Path, ...] | None:
    if not text:
        return None
    return tuple(_folder(part, "QBATCH_MODEL_ROOTS") for part in text.split(os.pathsep) if part)


def _folder(path: str | Path, variable: str) -> Path:
    """The absolute path. Raises UsageError if ``~`` has no meaning here, as for a container's user without an entry."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        if str(path).startswith("~/"):
            why = "HOME is not set, and this user has no entry in /etc/passwd"
        else:
            why = f"{path} is not the home of any user"
        raise UsageError(f"{why}: set {variable} to the path of a folder") from error


def _names(text: str | None) -> frozenset[str]:
    """A comma-separated list of models, each a hub id or an absolute folder. A trailing slash is removed."""
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
        raise UsageError(f"{_variable(name)} must be greater than 0 and finite, not {text}")
    return value
