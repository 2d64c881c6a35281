"""A worker's own staging folder, with a heartbeat file that shows whether the worker is alive.

Everyone who shares the storage can see the heartbeat. A database could not tell: the folder may belong to a worker of
another database, or the database may be a restored copy that does not know about recent work.
"""

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
from qbatch.core.filesystem import NO_SPACE_ERRNOS
from qbatch.worker.files.staging import remove_stale, storage_error

log = logging.getLogger("qbatch.worker")

_HEARTBEAT = ".heartbeat"
# For a folder whose heartbeat file does not say how long it is valid.
_DEAD_AFTER_S = 3600.0


class OwnStaging:
    """The folder ``parent/<name>``. A thread renews its heartbeat until ``close``, which removes the folder.

    The heartbeat is the mtime of a file, because some network file systems have no locks. The file contains how long it
    is valid, because a process that reads it may be configured with another lease.
    """

    def __init__(self, parent: Path, name: str, *, lease_s: float, renew_s: float) -> None:
        self.parent = parent
        self.folder = parent / name.replace("/", "-")
        self._text = json.dumps({"dead_after_s": 2 * lease_s}).encode()
        self._renew_s = renew_s
        self._closed = threading.Event()
        # A daemon thread, so that it does not keep a worker alive that fails while it stops.
        self._thread = threading.Thread(target=self._beat, name="staging", daemon=True)

    def start(self) -> Self:
        """Create the folder and start the heartbeat. Raises StorageUnavailable.

        A full disk is not an error here: jobs wait for free space, and workers make space by cleaning up.
        """
        try:
            self.folder.mkdir(parents=True)
            self.renew()
        except OSError as error:
            if error.errno not in NO_SPACE_ERRNOS:
                raise StorageUnavailable(f"{error.filename}: {error.strerror}") from error
            log.warning("%s: %s; it will be created when there is free space", self.folder, error.strerror)
        self._thread.start()
        return self

    def close(self) -> None:
        self._closed.set()
        self._thread.join(self._renew_s)
        shutil.rmtree(self.folder, ignore_errors=True)  # other workers remove the rest when the heartbeat has expired

    def renew(self) -> float:
        """Renew the heartbeat. Returns the current time of the storage's clock. Raises OSError."""
        # Another worker may have removed the folder, for example because this machine slept.
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / _HEARTBEAT, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            # Written and not just touched, because on some mounts only a write gets the server's time. Written in
            # place, so that nobody reads a part of it.
            _write(descriptor, self._text)
        finally:
            os.close(descriptor)
        return (self.folder / _HEARTBEAT).stat().st_mtime

    def sweep(self, running: Callable[[Iterable[Token]], Iterable[int]], *, gone: Collection[str] = ()) -> list[str]:
        """Remove the folders of attempts that no longer run, of this worker and of dead ones. Returns their names.

        A worker counts as dead if its heartbeat has expired by the storage's clock, or if its name is in ``gone``,
        which lists workers whose processes no longer exist. Raises StorageError.
        """
        try:
            now = self._now()
            dead = [folder for folder in self._others() if folder.name in gone or is_dead(folder, now)]
            removed = remove_stale([self.folder, *dead], running)
            for folder in dead:
                remove_if_empty(folder)
        except OSError as error:
            raise StorageError(str(storage_error(error, "cannot clean up the staging folder"))) from error
        return removed

    def _now(self) -> float:
        """The time of the storage's clock. If the disk is full, 0, so that no worker counts as dead. Raises OSError."""
        try:
            return self.renew()
        except OSError as error:
            if error.errno not in NO_SPACE_ERRNOS:
                raise
            return 0.0

    def _others(self) -> list[Path]:
        return [folder for folder in self.parent.iterdir() if folder != self.folder and folder.is_dir()]

    def _beat(self) -> None:
        has_warned = False
        while not self._closed.wait(self._renew_s):
            try:
                self.renew()
                has_warned = False
            except OSError as error:
                if not has_warned:
                    log.warning(
                        "the heartbeat in %s cannot be renewed: %s; other workers may consider this one dead",
                        self.folder,
                        error.strerror,
                    )
                has_warned = True


def is_dead(folder: Path, now: float) -> bool:
    """Whether the heartbeat of ``folder`` has expired. ``now`` is the time of the storage's clock. Raises OSError."""
    try:
        with (folder / _HEARTBEAT).open("rb") as file:
            # The stat of an open file, because only that is up to date on a network file system.
            renewed, text = os.fstat(file.fileno()).st_mtime, file.read()
        return now - renewed > float(json.loads(text)["dead_after_s"])
    except FileNotFoundError:  # the folder was just created, or its worker was killed at that moment
        return folder.is_dir() and now - folder.stat().st_mtime > _DEAD_AFTER_S
    except (ValueError, LookupError, TypeError):
        return now - renewed > _DEAD_AFTER_S


def _write(descriptor: int, text: bytes) -> None:
    try:
        os.pwrite(descriptor, text, 0)
    except OSError as error:
        # Copy-on-write file systems need free space even to overwrite a byte.
        if error.errno not in NO_SPACE_ERRNOS:
            raise
        os.utime(descriptor)


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a dead worker if no attempt has anything there. Raises OSError."""
    if [path.name for path in folder.iterdir()] in ([_HEARTBEAT], []):
        shutil.rmtree(folder, ignore_errors=True)  # its owner may be back, or another worker may be removing it too
