"""The embedded stack: a private Redis, a scheduler and workers, run as child processes of one command."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from qbatch.core.errors import DatabaseUnreachable, StackNotRunning, StorageUnavailable, WrongDatabase
from qbatch.core.filesystem import no_locks, why_unusable
from qbatch.core.private_folder import make_private
from qbatch.core.settings import Settings
from qbatch.models_db.session import Database
from qbatch.scheduler.child_process import Child
from qbatch.scheduler.private_redis import PrivateRedis
from qbatch.scheduler.stack_lock import lock_of_stack

_DRAIN_S = 30.0
_LOCK_S = 1.0
_REDIS_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ", "TMPDIR")


class LocalStack:
    """A context manager: the child processes run inside it, and all have stopped when it exits."""

    def __init__(
        self,
        settings: Settings,
        *,
        worker_args: Sequence[str],
        environ: Mapping[str, str],
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_start`` is called once nothing stands in the way of starting the services."""
        self._settings = settings
        self._on_start = on_start
        self._environ = dict(environ)
        self._lock: IO[bytes] | None = None
        logs = settings.home / "logs"
        python = [sys.executable, "-P", "-m"]
        # Other processes of this user can read the environment of Redis, so it gets no secrets.
        plain = {name: environ[name] for name in _REDIS_VARIABLES if name in environ}
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
        """Start everything. Raises StackNotRunning if another stack uses this home, WrongDatabase, or the error of a
        service."""
        prepare_home(self._settings)
        _refuse_wrong_database(self._settings)
        self._take_lock()
        try:
            self._on_start()
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

    def supervise(self) -> None:
        """Restart children that have died, and a Redis that clients cannot reach.

        Call it from the thread that entered the context, because children end with the thread that started them.
        Raises StackNotRunning if the workers or the scheduler report that they cannot work here.
        """
        self._redis.supervise()
        for child in (self._scheduler, self._workers):
            if child.supervise() is not None and child.has_refused:
                log = self._settings.home / "logs" / f"{child.name}.log"
                raise StackNotRunning(f"the {child.name} cannot work: {_last_line(log)}")

    def stop(self) -> None:
        """Stop everything, the workers first, so that they can return their jobs while the services still run."""
        for child in (self._workers, self._scheduler):
            child.ask_to_stop()
            child.wait(_DRAIN_S)
        if self._lock is not None:
            self._redis.stop()
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        lock = lock_of_stack(self._settings).open("a+b")
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                # ``stack_is_running`` in another process holds the lock for a moment, so try for a while.
                if time.monotonic() > deadline:
                    lock.close()
                    raise StackNotRunning(f"a stack of {self._settings.home} is already running") from error
                time.sleep(0.02)
            except OSError as error:
                lock.close()
                raise no_locks(self._settings.home, error, "the stack", "QBATCH_HOME") from error
        self._lock = lock


def prepare_home(settings: Settings) -> None:
    """Create the folders that the embedded stack needs. Raises StorageUnavailable."""
    try:
        for name, folder in (("home", settings.home), ("storage", settings.storage)):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise StorageUnavailable(f"the {name} {folder} is not writable")
        make_private(settings.socket_dir)
    except OSError as error:
        raise StorageUnavailable(why_unusable(error)) from error


def _refuse_wrong_database(settings: Settings) -> None:
    """Raise WrongDatabase before anything is started. For a server that does not answer, the services wait."""
    database = Database(settings.sqlalchemy_url)
    if not database.is_sqlite:
        return
    try:
        database.is_behind()
    except WrongDatabase:
        raise
    except DatabaseUnreachable:
        return
    finally:
        database.dispose()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"see {log}")
