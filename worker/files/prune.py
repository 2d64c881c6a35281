"""``qbatch prune``: remove old batches with their files on the storage, except checkpoints, and old file checksums."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qbatch.core.job_log import job_of_log
from qbatch.core.settings import Settings
from qbatch.core.storage import BASE_OUTPUTS
from qbatch.models_db import file_digests, skip_list_keys
from qbatch.models_db.database_id import database_id
from qbatch.models_db.retention import Prunable, delete_empty, delete_jobs, existing, find_prunable, needed_since
from qbatch.models_db.session import Database
from qbatch.worker.files.reference_folders import IN_USE_S, remove_unused, stored_references

# Rows per transaction. SQLite has one writer at a time, and workers must be able to renew their leases.
_AT_ONCE = 200
# How far the clocks of hosts, which date files, may differ from that of the database, which dates rows.
_CLOCKS_APART_S = 3600.0
_Id = TypeVar("_Id", int, str)
_REJECTED = re.compile(r".+\.rejected-([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What was removed of one kind, or would be. ``size_bytes`` is None if unknown; each problem is one line."""

    what: str
    number: int
    size_bytes: int | None = None
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, str | int | None]:
        return {"what": self.what, "number": self.number, "bytes": self.size_bytes}


def prune(database: Database, settings: Settings, older_than_s: float, *, dry_run: bool = False) -> list[Pruned]:
    """Remove what is older than ``older_than_s`` seconds, or report what would be removed.

    Checkpoints and their rows are kept. It is safe while workers run, and may be interrupted and run again. Raises
    DatabaseUnreachable; files that cannot be removed are listed in ``problems``.
    """
    with database.read() as session:
        prunable = find_prunable(session, older_than_s)
        needed_s = needed_since(session, older_than_s).timestamp()
        places = file_digests.hashed_before(session, older_than_s)
        own_logs = settings.logs_of(database_id(session))
    batches, jobs = len(prunable.batch_ids), len(prunable.job_ids)
    if not dry_run:
        batches, jobs = _delete(database, prunable, older_than_s)
    before_s = time.time() - older_than_s
    gone = frozenset(prunable.job_ids) if dry_run else frozenset[int]()
    return [
        Pruned(what="batches", number=batches),
        Pruned(what="jobs", number=jobs),
        _remove("logs", _logs(database, own_logs, before_s, gone), Path.unlink, dry_run=dry_run),
        _remove("rejected checkpoints", _rejected(settings, before_s), shutil.rmtree, dry_run=dry_run),
        _base_outputs(settings, min(needed_s - _CLOCKS_APART_S, time.time() - IN_USE_S), dry_run=dry_run),
        Pruned(what="file digests", number=len(places) if dry_run else _forget(database, places, older_than_s)),
    ]


def _delete(database: Database, prunable: Prunable, older_than_s: float) -> tuple[int, int]:
    """Delete rows. Returns how many batches and jobs were deleted."""
    jobs = batches = 0
    for job_ids in _chunks(prunable.job_ids):
        with _pausing_afterwards(), database.write() as session:
            jobs += delete_jobs(session, job_ids, older_than_s)
    for batch_ids in _chunks(prunable.batch_ids):
        with _pausing_afterwards(), database.write() as session:
            batches += delete_empty(session, batch_ids)
    return batches, jobs


def _forget(database: Database, places: Sequence[str], older_than_s: float) -> int:
    """Delete checksums, and what skip lists mean. Returns how many files will be hashed again when they are used."""
    forgotten = 0
    for chunk in _chunks(places):
        with _pausing_afterwards(), database.write() as session:
            forgotten += file_digests.forget(session, chunk, older_than_s)
    with database.write() as session:
        skip_list_keys.forget(session, older_than_s)
    return forgotten


def _chunks(ids: Sequence[_Id]) -> Iterator[Sequence[_Id]]:
    return (ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE))


@contextlib.contextmanager
def _pausing_afterwards() -> Iterator[None]:
    """Pause for as long as the block took, so that others who wait to write get a turn."""
    begun = time.monotonic()
    yield
    time.sleep(time.monotonic() - begun)


def _logs(database: Database, folder: Path, before_s: float, gone: frozenset[int]) -> Iterator[Path]:
    """The old logs of jobs that do not exist, or that are in ``gone``.

    A runner's log is named after the first job of its bundle, which is kept as long as any of its jobs. Version 0.1.0
    wrote the logs of all databases to the parent folder; those are judged by age alone.
    """
    named = {path: job_id for path in folder.glob("*") if (job_id := job_of_log(path.name)) is not None}
    ids = sorted(set(named.values()))
    present: set[int] = set()
    for chunk in _chunks(ids):
        with database.read() as session:
            present |= existing(session, chunk)
    kept = present - gone
    orphans = (path for path, job_id in named.items() if job_id not in kept)
    earlier = (path for path in folder.parent.glob("*") if job_of_log(path.name) is not None)
    return (path for path in (*orphans, *earlier) if _is_older(path, before_s))


def _is_older(path: Path, before_s: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime < before_s
    return False


def _rejected(settings: Settings, before_s: float) -> Iterator[Path]:
    """Damaged checkpoints that were moved aside longer ago than ``before_s``; their names contain the time."""
    for folder in settings.checkpoints.glob("*/*.rejected-*"):
        match = _REJECTED.fullmatch(folder.name)
        if match is not None and int(match[1]) / 1e9 < before_s:
            yield folder


def _base_outputs(settings: Settings, before_s: float, *, dry_run: bool) -> Pruned:
    unused = (folder for used_s, folder, _ in stored_references(settings.storage / BASE_OUTPUTS) if used_s < before_s)
    return _remove("base outputs", unused, lambda folder: remove_unused(folder, before_s), dry_run=dry_run)


def _remove(what: str, paths: Iterable[Path], remove: Callable[[Path], object], *, dry_run: bool) -> Pruned:
    sizes: list[int] = []
    problems: list[str] = []
    for path in list(paths):
        try:
            size_bytes = _size(path)
            if dry_run or remove(path) is not False:
                sizes.append(size_bytes)
        except FileNotFoundError:  # another prune has removed it
            continue
        except OSError as error:
            problems.append(f"{error.filename or path} cannot be removed: {error.strerror}")
    return Pruned(what=what, number=len(sizes), size_bytes=sum(sizes), problems=tuple(problems))


def _size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder. Raises OSError."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
