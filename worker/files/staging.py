"""The folders for an attempt's files until they are published. On the storage, as a rename cannot cross file systems.

.staging/<database>/<worker>/<job>-<attempt>/        ``staging`` is the folder of one worker (see ``own_staging``)
.staging/<database>/trainings/<key>/                 how far the training of an adapter has come
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

KEPT_TRAININGS = "trainings"
"""The folder of trainings that have begun, beside those of workers: each in one named by its adapter's key, so that any
worker goes on with it after a kill."""

_FOLDER = re.compile(r"([0-9]+)-([0-9]+)")
# Every checkpoint is larger than this.
_LEAST_BYTES = 2**16


def stage(staging: Path, job_id: int, attempt: int) -> Path:
    """Create an empty folder for an attempt's files, and remove those of earlier attempts of the job.

    The folder of a later attempt is left alone: this attempt may have lost its job without knowing it yet.
    Raises DiskFull or StorageError.
    """
    folder = folder_of(staging, job_id, attempt)
    try:
        for other in staging.glob(f"{job_id}-*"):
            if int(other.name.rpartition("-")[2]) <= attempt:
                unstage(other)
        # Our own folder was removed above. If it exists now, a first mkdir succeeded and its reply was lost.
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(error, staging) from error
    return folder


def _no_folder(error: OSError, staging: Path) -> DiskFull | StorageError:
    """If the storage is completely full, the error says how much space a retry should wait for."""
    failure = storage_error(error, "cannot create a staging folder")
    if isinstance(failure, DiskFull) and (space := disk_space(staging)) is not None and space.free < _LEAST_BYTES:
        failure.needed_bytes = _LEAST_BYTES
    return failure


def folder_of(staging: Path, job_id: int, attempt: int) -> Path:
    return staging / f"{job_id}-{attempt}"


def unstage(folder: Path) -> None:
    """Remove a staging folder, even if it does not exist or others are removing it too. Raises StorageError."""
    try:
        while folder.exists():
            # If another process has removed one of the files, try again with the rest.
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)
    except OSError as error:
        # Never DiskFull, although some file systems need space to remove a file: no job should wait for that.
        raise StorageError(str(storage_error(error, "cannot remove a staging folder"))) from error


def remove_stale(folders: Sequence[Path], running: Callable[[Iterable[Token]], Iterable[int]]) -> list[str]:
    """Remove from ``folders`` what attempts left that no longer run, for example killed runners. Returns their names.

    ``running`` tells which attempts still hold their jobs. It is called after the folders were listed, so an attempt
    that begins meanwhile is safe. Raises StorageError.
    """
    stale = stale_folders(folders, running)
    for path in stale:
        unstage(path)
    return [path.name for path in stale]


def stale_folders(folders: Sequence[Path], running: Callable[[Iterable[Token]], Iterable[int]]) -> list[Path]:
    """What ``remove_stale`` would remove."""
    paths = [path for folder in folders for path in folder.glob("*-*")]
    tokens = {path: (int(match[1]), int(match[2])) for path in paths if (match := _FOLDER.fullmatch(path.name))}
    held = frozenset(running(tokens.values()))
    return [path for path, (job_id, _) in tokens.items() if job_id not in held]


def require_space(folder: Path, nbytes: int, reserved_bytes: int = 0) -> None:
    """Raise DiskFull if less than ``nbytes`` are free in addition to the ``reserved_bytes`` that others will use.

    Raises StorageError if even the whole file system is too small, because waiting cannot help then. A file system that
    does not report its space passes.
    """
    space = disk_space(folder)
    if space is None:
        return
    left = max(0, space.free - reserved_bytes)
    if space.capacity < nbytes:
        raise StorageError(
            f"the checkpoint needs {mib(nbytes)}, more than the whole storage, which has {mib(space.capacity)}"
        )
    if left < nbytes:
        # The others will have used their reservation by the time somebody waits for this space, so it is not added.
        raise DiskFull(f"the checkpoint needs {mib(nbytes)}, and the storage has {mib(left)} left", nbytes)


def storage_error(error: OSError, doing: str) -> DiskFull | StorageError:
    # For a copy, the second name is the target.
    place = error.filename2 or error.filename or "storage"
    return storage_fault(error)(f"{doing}: {error.strerror or error} ({place})")
