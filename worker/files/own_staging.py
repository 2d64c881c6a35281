"""A worker's own folder for staging. That its owner lives is seen on the storage itself, by whoever shares it: not by
asking a database, which may be another's, or a copy that knows nothing of what was begun since."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Self

from qbatch.core.domain import Token
from qbatch.core.errors import StorageError, StorageUnavailable
from qbatch.core.filesystem import NO_ROOM
from qbatch.worker.files.staging import remove_stale, storage_error

log = logging.getLogger("qbatch.worker")

_HEARTBEAT = ".heartbeat"
# Of a folder whose heartbeat does not say for how long it stands.
_DEAD_AFTER_S = 3600.0


class OwnStaging:
    """``place/<name>``, renewed by a thread of its own until it is closed; then it is removed.

    The heartbeat is a file whose mtime is renewed, since not every network's file system has locks. It says itself for
    how long it stands: whoever reads it may have been set another lease.
    """

    def __init__(self, place: Path, name: str, *, lease_s: float, renew_s: float) -> None:
        self.place = place
        self.folder = place / name.replace("/", "-")
        self._text = json.dumps({"dead_after_s": 2 * lease_s}).encode()
        self._renew_s = renew_s
        self._closed = threading.Event()
        # A daemon: a worker that fails on its way out must not be kept by it.
        self._thread = threading.Thread(target=self._beat, name="staging", daemon=True)

    def start(self) -> Self:
        """Raises StorageUnavailable; not for want of room, which jobs wait for and workers make by sweeping."""
        try:
            self.folder.mkdir(parents=True)
            self.renew()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise StorageUnavailable(f"{error.filename}: {error.strerror}") from error
            log.warning("%s: %s; it is made when there is room", self.folder, error.strerror)
        self._thread.start()
        return self

    def close(self) -> None:
        self._closed.set()
        self._thread.join(self._renew_s)
        shutil.rmtree(self.folder, ignore_errors=True)  # what is left of it is dead soon, and others remove it

    def renew(self) -> float:
        """Show that the owner lives; what the storage's clock says now. Raises OSError."""
        # Others took it for dead, if it is gone: while this machine slept, say.
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / _HEARTBEAT, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            # Written, not touched: on some mounts only then it is the server that says when. In place, so that nobody
            # reads half of it.
            _write(descriptor, self._text)
        finally:
            os.close(descriptor)
        return (self.folder / _HEARTBEAT).stat().st_mtime

    def sweep(self, running: Callable[[Iterable[Token]], Iterable[int]], *, gone: Collection[str] = ()) -> list[str]:
        """Remove the folders of attempts that run no more, ours and those of workers that are dead; their names.

        A worker is dead whose heartbeat is too old by the storage's clock, or whose name is among ``gone``: its
        process is no more, for certain. Raises StorageError.
        """
        try:
            now = self._now()
            dead = [folder for folder in self._others() if folder.name in gone or is_dead(folder, now)]
            removed = remove_stale([self.folder, *dead], running)
            for folder in dead:
                _remove_if_empty(folder)
        except OSError as error:
            raise StorageError(str(storage_error(error, "cannot sweep the staging folder"))) from error
        return removed

    def _now(self) -> float:
        """By the storage's clock; without room to ask it, a time at which nobody is dead yet. Raises OSError."""
        try:
            return self.renew()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return 0.0

    def _others(self) -> list[Path]:
        return [folder for folder in self.place.iterdir() if folder != self.folder and folder.is_dir()]

    def _beat(self) -> None:
        said = False
        while not self._closed.wait(self._renew_s):
            try:
                self.renew()
                said = False
            except OSError as error:
                if not said:
                    log.warning("%s: %s; others may take this worker for dead", self.folder, error.strerror)
                said = True


def is_dead(folder: Path, now: float) -> bool:
    """Whether nobody has renewed ``folder`` for as long as its heartbeat stands; ``now`` by the storage's clock.

    Raises OSError.
    """
    try:
        with (folder / _HEARTBEAT).open("rb") as file:
            # Of an open file: only then are a network's attributes those of now.
            renewed, text = os.fstat(file.fileno()).st_mtime, file.read()
        return now - renewed > float(json.loads(text)["dead_after_s"])
    except FileNotFoundError:  # made a moment ago, or left so by whoever was killed
        return folder.is_dir() and now - folder.stat().st_mtime > _DEAD_AFTER_S
    except (ValueError, LookupError, TypeError):
        return now - renewed > _DEAD_AFTER_S


def _write(descriptor: int, text: bytes) -> None:
    try:
        os.pwrite(descriptor, text, 0)
    except OSError as error:
        # No room for a byte, not even in the place of another: some file systems write every byte anew.
        if error.errno not in NO_ROOM:
            raise
        os.utime(descriptor)


def _remove_if_empty(folder: Path) -> None:
    if [path.name for path in folder.iterdir()] in ([_HEARTBEAT], []):
        shutil.rmtree(folder, ignore_errors=True)  # its owner may have come back, or others remove it too
