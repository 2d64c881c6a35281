"""``qbatch prune``: batches that ended long ago go, with what the storage keeps for them but checkpoints; so do the
digests of files that were hashed long ago."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qbatch.core.settings import Settings
from qbatch.core.storage import BASE_OUTPUTS
from qbatch.models_db import file_digests
from qbatch.models_db.database_id import database_id
from qbatch.models_db.retention import Prunable, delete_empty, delete_jobs, existing, find_prunable, needed_since
from qbatch.models_db.session import Database
from qbatch.worker.files.reference_folders import IN_USE_S, occupants, remove_unused

# In one transaction: SQLite has one writer, and workers renew their leases.
_AT_ONCE = 200
# Files are dated by their hosts' clocks, rows by the database's.
_CLOCKS_APART_S = 3600.0
_Id = TypeVar("_Id", int, str)
_LOG = re.compile(r"j([0-9]+)-[0-9]+\.log")
_REJECTED = re.compile(r".+\.rejected-([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What went of one kind, or would go. ``size_bytes`` None where nobody can tell; ``problems`` are a line each."""

    what: str
    number: int
    size_bytes: int | None = None
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, str | int | None]:
        return {"what": self.what, "number": self.number, "bytes": self.size_bytes}


def prune(database: Database, settings: Settings, older_than_s: float, *, dry_run: bool = False) -> list[Pruned]:
    """Remove what is ``older_than_s`` seconds old, or say what would go. Checkpoints stay, and so does the record of
    them. Safe beside workers, and to be begun again where it broke off.

    Raises DatabaseUnreachable. What cannot be removed from the storage is among the ``problems``.
    """
    with database.read() as session:
        found = find_prunable(session, older_than_s)
        needed_s = needed_since(session, older_than_s).timestamp()
        places = file_digests.hashed_before(session, older_than_s)
        own_logs = settings.logs_of(database_id(session))
    batches, jobs = len(found.batch_ids), len(found.job_ids)
    if not dry_run:
        batches, jobs = _delete(database, found, older_than_s)
    before_s = time.time() - older_than_s
    gone = frozenset(found.job_ids) if dry_run else frozenset[int]()
    return [
        Pruned(what="batches", number=batches),
        Pruned(what="jobs", number=jobs),
        _remove("logs", _logs(database, own_logs, before_s, gone), Path.unlink, dry_run=dry_run),
        _remove("rejected checkpoints", _rejected(settings, before_s), shutil.rmtree, dry_run=dry_run),
        _base_outputs(settings, min(needed_s - _CLOCKS_APART_S, time.time() - IN_USE_S), dry_run=dry_run),
        Pruned(what="file digests", number=len(places) if dry_run else _forget(database, places, older_than_s)),
    ]


def _delete(database: Database, found: Prunable, older_than_s: float) -> tuple[int, int]:
    """How many batches and jobs went."""
    jobs = batches = 0
    for job_ids in _chunks(found.job_ids):
        with _leaving_room(), database.write() as session:
            jobs += delete_jobs(session, job_ids, older_than_s)
    for batch_ids in _chunks(found.batch_ids):
        with _leaving_room(), database.write() as session:
            batches += delete_empty(session, batch_ids)
    return batches, jobs


def _forget(database: Database, places: Sequence[str], older_than_s: float) -> int:
    """How many files will be hashed again when they are next used."""
    forgotten = 0
    for chunk in _chunks(places):
        with _leaving_room(), database.write() as session:
            forgotten += file_digests.forget(session, chunk, older_than_s)
    return forgotten


def _chunks(ids: Sequence[_Id]) -> Iterator[Sequence[_Id]]:
    return (ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE))


@contextlib.contextmanager
def _leaving_room() -> Iterator[None]:
    """Whoever waits to write gets as much time as was taken."""
    begun = time.monotonic()
    yield
    time.sleep(time.monotonic() - begun)


def _logs(database: Database, folder: Path, before_s: float, gone: frozenset[int]) -> Iterator[Path]:
    """The old logs of jobs that are not there, or are ``gone``.

    A log has the name of the first job of its bundle, which stays as long as any of them. Those of version 0.1.0 lie
    above, of all databases together: they go by their age.
    """
    named = {path: int(match[1]) for path in folder.glob("*") if (match := _LOG.fullmatch(path.name))}
    ids = sorted(set(named.values()))
    there: set[int] = set()
    for chunk in _chunks(ids):
        with database.read() as session:
            there |= existing(session, chunk)
    kept = there - gone
    orphans = (path for path, job_id in named.items() if job_id not in kept)
    earlier = (path for path in folder.parent.glob("*") if _LOG.fullmatch(path.name))
    return (path for path in (*orphans, *earlier) if _is_older(path, before_s))


def _is_older(path: Path, before_s: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime < before_s
    return False


def _rejected(settings: Settings, before_s: float) -> Iterator[Path]:
    """What was moved aside since it did not verify; its name says when."""
    for folder in settings.checkpoints.glob("*/*.rejected-*"):
        match = _REJECTED.fullmatch(folder.name)
        if match is not None and int(match[1]) / 1e9 < before_s:
            yield folder


def _base_outputs(settings: Settings, before_s: float, *, dry_run: bool) -> Pruned:
    unused = (folder for used_s, folder, _ in occupants(settings.storage / BASE_OUTPUTS) if used_s < before_s)
    return _remove("base outputs", unused, lambda folder: remove_unused(folder, before_s), dry_run=dry_run)


def _remove(what: str, paths: Iterable[Path], remove: Callable[[Path], object], *, dry_run: bool) -> Pruned:
    sizes: list[int] = []
    problems: list[str] = []
    for path in list(paths):
        try:
            size_bytes = _size(path)
            if dry_run or remove(path) is not False:
                sizes.append(size_bytes)
        except FileNotFoundError:  # another prune was first
            continue
        except OSError as error:
            problems.append(f"{error.filename or path} cannot be removed: {error.strerror}")
    return Pruned(what=what, number=len(sizes), size_bytes=sum(sizes), problems=tuple(problems))


def _size(path: Path) -> int:
    """In bytes, of a file or of all the files of a folder. Raises OSError."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
