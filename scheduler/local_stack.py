"""The embedded stack: a private Redis, a scheduler and workers, as children of one command on one machine."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from qbatch.core.errors import StackNotRunning, StorageUnavailable
from qbatch.core.filesystem import no_locks
from qbatch.core.private_folder import make_private
from qbatch.core.settings import Settings
from qbatch.scheduler.child_process import Child
from qbatch.scheduler.private_redis import PrivateRedis

_DRAIN_S = 30.0
_LOCK_S = 1.0
_OF_REDIS = ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ", "TMPDIR")


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
        except OSError:  # without locks no stack starts
            return False
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
        self._redis = PrivateRedis(settings, environ=plain)
        self._scheduler = Child(
            "scheduler", [*python, "qbatch.scheduler"], env=self._environ, log_path=logs / "scheduler.log"
        )
        self._workers = Child(
            "workers",
            [*python, "qbatch.worker", "launch", *worker_args],
            env=self._environ,
            log_path=logs / "workers.log",
        )

    def __enter__(self) -> Self:
        """Start everything. Raises StackNotRunning where another stack holds this home, or a service's error."""
        prepare_home(self._settings)
        self._take_lock()
        try:
            self._redis.start()
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
        """Start again what died, and a Redis that nobody reaches.

        Call it from the thread that entered: children die with the thread they came from. Raises StackNotRunning when
        the workers say that they cannot work here at all.
        """
        self._redis.tend()
        for child in (self._scheduler, self._workers):
            if child.tend() is not None and child.has_refused:
                log = self._settings.home / "logs" / f"{child.name}.log"
                raise StackNotRunning(f"the {child.name} cannot work: {_last_line(log)}")

    def stop(self) -> None:
        """Workers first, so that they hand their jobs back while the services still answer."""
        for child in (self._workers, self._scheduler):
            child.ask_to_stop()
            child.wait(_DRAIN_S)
        if self._lock is not None:
            self._redis.stop()
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
            except OSError as error:
                lock.close()
                raise no_locks(self._settings.home, error, "the stack", "QBATCH_HOME") from error
        self._lock = lock


def prepare_home(settings: Settings) -> None:
    """Make the folders that the embedded stack needs. Raises StorageUnavailable."""
    try:
        for name, folder in (("home", settings.home), ("storage", settings.storage)):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise StorageUnavailable(f"the {name} {folder} is not writable")
        make_private(settings.socket_dir)
    except OSError as error:
        raise StorageUnavailable(f"{error.filename}: {error.strerror}") from error


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"see {log}")
