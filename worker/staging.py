"""Where an attempt's files lie until they are published: on the storage, since a rename cannot cross file systems."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from models_db.errors import DiskFull, StorageError

Token = tuple[int, int]

_FOLDER = re.compile(r"([0-9]+)-([0-9]+)")


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
        folder.mkdir(parents=True)
    except OSError as error:
        raise storage_error(error, "cannot make a staging folder") from error
    return folder


def folder_of(staging: Path, job_id: int, attempt: int) -> Path:
    return staging / f"{job_id}-{attempt}"


def unstage(folder: Path) -> None:
    """Remove a staging folder; one that is gone is fine. Raises StorageError."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(error, "cannot remove a staging folder") from error


def sweep(staging: Path, running: Callable[[Iterable[Token]], Iterable[int]]) -> list[str]:
    """Remove the folders of attempts that run no more, which a killed runner could not; their names.

    ``running`` tells which of the attempts still hold their jobs. It is asked after the folders were listed, so an
    attempt that begins meanwhile is safe. Raises StorageError.
    """
    found = {folder: match for folder in staging.glob("*-*") if (match := _FOLDER.fullmatch(folder.name))}
    tokens = {folder: (int(match[1]), int(match[2])) for folder, match in found.items()}
    held = frozenset(running(tokens.values()))
    stale = [folder for folder, (job_id, _) in tokens.items() if job_id not in held]
    for folder in stale:
        unstage(folder)
    return [folder.name for folder in stale]


def storage_error(error: OSError, doing: str) -> DiskFull | StorageError:
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(f"{doing}: {error.strerror or error} ({error.filename or 'storage'})")
