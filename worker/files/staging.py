"""Where an attempt's files lie until they are published: on the storage, since a rename cannot cross file systems.

.staging/<database>/<worker>/<job>-<attempt>/        ``staging`` is a worker's folder of it (see ``own_staging``)
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from qbatch.core.byte_units import mib
from qbatch.core.domain import Token
from qbatch.core.errors import DiskFull, StorageError
from qbatch.core.filesystem import disk_space, storage_fault

_FOLDER = re.compile(r"([0-9]+)-([0-9]+)")
# No checkpoint takes less.
_LEAST_BYTES = 2**16


def stage(staging: Path, job_id: int, attempt: int) -> Path:
    """An empty folder for this attempt's files; what earlier attempts of the job left is removed.

    A later attempt's is left alone: ours may be one that lost its job and does not know it yet.
    Raises DiskFull or StorageError.
    """
    folder = folder_of(staging, job_id, attempt)
    try:
        for other in staging.glob(f"{job_id}-*"):
            if int(other.name.rpartition("-")[2]) <= attempt:
                unstage(other)
        # Of ours, nothing is there by now: what is there was made by a first try whose reply was lost.
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(error, staging) from error
    return folder


def _no_folder(error: OSError, staging: Path) -> DiskFull | StorageError:
    """Nothing is begun by then: a storage that is full to the last byte is waited for."""
    found = storage_error(error, "cannot make a staging folder")
    if isinstance(found, DiskFull) and (room := disk_space(staging)) is not None and room.free < _LEAST_BYTES:
        found.needed_bytes = _LEAST_BYTES
    return found


def folder_of(staging: Path, job_id: int, attempt: int) -> Path:
    return staging / f"{job_id}-{attempt}"


def unstage(folder: Path) -> None:
    """Remove a staging folder; one that is gone, or that others remove as well, is fine. Raises StorageError."""
    try:
        while folder.exists():
            # Another was first with some file of it, and the rest is still there.
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
    except OSError as error:
        # Not even for want of room, which some file systems need to remove a file: nothing waits for it.
        raise StorageError(str(storage_error(error, "cannot remove a staging folder"))) from error


def remove_stale(folders: Sequence[Path], running: Callable[[Iterable[Token]], Iterable[int]]) -> list[str]:
    """Remove from ``folders`` what attempts left there that run no more, which a killed runner could not; their names.

    ``running`` tells which of the attempts still hold their jobs. It is asked after the folders were listed, so an
    attempt that begins meanwhile is safe. Raises StorageError.
    """
    paths = [path for folder in folders for path in folder.glob("*-*")]
    tokens = {path: (int(match[1]), int(match[2])) for path in paths if (match := _FOLDER.fullmatch(path.name))}
    held = frozenset(running(tokens.values()))
    stale = [path for path, (job_id, _) in tokens.items() if job_id not in held]
    for path in stale:
        unstage(path)
    return [path.name for path in stale]


def require_space(folder: Path, nbytes: int, owed_bytes: int = 0) -> None:
    """Raises DiskFull where the file system of ``folder`` has less than ``nbytes`` left beside the ``owed_bytes`` that
    are promised to others, StorageError where it never will have as much: nobody should wait for that. A file system
    that does not say is tried."""
    room = disk_space(folder)
    if room is None:
        return
    left = max(0, room.free - owed_bytes)
    if room.capacity < nbytes:
        raise StorageError(f"the storage holds {mib(room.capacity)}, and a checkpoint of {mib(nbytes)} is due")
    if left < nbytes:
        # Those have taken theirs by the time that anyone looks for the room of this one.
        raise DiskFull(f"the storage has {mib(left)} left, and a checkpoint of {mib(nbytes)} is due", nbytes)


def storage_error(error: OSError, doing: str) -> DiskFull | StorageError:
    # Of a copy the second name is where it was going.
    place = error.filename2 or error.filename or "storage"
    return storage_fault(error)(f"{doing}: {error.strerror or error} ({place})")
