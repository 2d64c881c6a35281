"""Files and folders on the storage that are removed by their age: logs, damaged checkpoints, baseline outputs."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qbatch.core.job_log import job_of_log
from qbatch.core.settings import Settings
from qbatch.core.storage import BASE_OUTPUTS
from qbatch.models_db.retention import existing
from qbatch.models_db.session import Database
from qbatch.worker.checkpoints.ownership import why_not_ours
from qbatch.worker.files.reference_folders import IN_USE_S, abandoned_folders, remove_unused, stored_references

# Rows per transaction. SQLite has one writer at a time, and workers must be able to renew their leases.
_AT_ONCE = 200
# How far the clocks of hosts, which date files, may differ from that of the database, which dates rows.
_CLOCKS_APART_S = 3600.0
REJECTED = re.compile(r"(.+)\.rejected-([0-9]+)")
"""The name of a damaged checkpoint that was moved aside, with its former name and the time in nanoseconds."""
MOVED_ASIDE = re.compile(r"\.(.+)\.removed-([0-9a-f-]{36})-([0-9]+)")
"""The name of a folder that is being removed: its former name, the database that removes it, and when in ns."""
_Id = TypeVar("_Id", int, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What was removed of one kind, or would be. ``size_bytes`` is None if unknown; each problem is one line.

    ``paths`` are the files and folders, where they are named. ``kept`` has what looks alike and must stay: path, why.
    """

    what: str
    number: int
    size_bytes: int | None = None
    problems: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, str | int | None]:
        return {"what": self.what, "number": self.number, "bytes": self.size_bytes}

    def to_json_with_paths(self) -> dict[str, Any]:
        return self.to_json() | {
            "paths": list(self.paths),
            "kept": [{"path": path, "why": why} for path, why in self.kept],
        }

    @property
    def kept_lines(self) -> list[str]:
        """Why some were kept, one line for each reason."""
        paths: dict[str, list[str]] = {}
        for path, why in self.kept:
            paths.setdefault(why, []).append(path)
        return [
            f"{kept[0] if len(kept) == 1 else f'{len(kept)} of the {self.what}'} kept: {why}"
            for why, kept in paths.items()
        ]


def chunks(ids: Sequence[_Id]) -> Iterator[Sequence[_Id]]:
    return (ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE))


def old_logs(database: Database, folder: Path, before_s: float, gone: Collection[int]) -> Iterator[Path]:
    """The old logs of jobs that do not exist, or that are in ``gone``.

    A runner's log is named after the first job of its bundle, which is kept as long as any of its jobs. Version 0.1.0
    wrote the logs of all databases to the parent folder; those are judged by age alone.
    """
    named = {path: job_id for path in folder.glob("*") if (job_id := job_of_log(path.name)) is not None}
    ids = sorted(set(named.values()))
    present: set[int] = set()
    for chunk in chunks(ids):
        with database.read() as session:
            present |= existing(session, chunk)
    kept = present - set(gone)
    orphans = (path for path, job_id in named.items() if job_id not in kept)
    earlier = (path for path in folder.parent.glob("*") if job_of_log(path.name) is not None)
    return (path for path in (*orphans, *earlier) if is_older(path, before_s))


def is_older(path: Path, before_s: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime < before_s
    return False


def rejected_checkpoints(
    settings: Settings, before_s: float, own: str, *, dry_run: bool, what: str = "rejected checkpoints"
) -> Pruned:
    """Damaged checkpoints that were moved aside longer ago than ``before_s``; their names contain the time.

    Those that another database made are its own.
    """

    def remove(folder: Path) -> None:
        # A folder that is half removed no longer says whose it is.
        aside = aside_of(folder, own)
        folder.rename(aside)
        remove_folder(aside)

    kept: list[tuple[str, str]] = []
    folders: list[Path] = []
    for folder in sorted(settings.checkpoints.glob("*/*.rejected-*")):
        match = REJECTED.fullmatch(folder.name)
        if match is None or int(match[2]) / 1e9 >= before_s:
            continue
        path = str(folder.relative_to(settings.storage))
        why = why_not_ours(settings.storage, path, own)
        if why is None:
            folders.append(folder)
        else:
            kept.append((path, why))
    return remove_each(what, folders, remove, settings.storage, dry_run=dry_run, kept=kept)


def aside_of(folder: Path, own: str) -> Path:
    """Where a folder is moved before it is removed for the database ``own`` (see ``MOVED_ASIDE``)."""
    return folder.with_name(f".{folder.name}.removed-{own}-{time.time_ns()}")


def remove_folder(folder: Path) -> None:
    """Remove a folder; of a link to one, only the link. Raises OSError."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def base_outputs(settings: Settings, needed_s: float, *, dry_run: bool) -> Pruned:
    """Baseline outputs that nobody has opened since ``needed_s``, and what killed writers left of some."""
    before_s = min(needed_s - _CLOCKS_APART_S, time.time() - IN_USE_S)
    root = settings.storage / BASE_OUTPUTS
    unused = [folder for used_s, folder, _ in stored_references(root) if used_s < before_s]
    abandoned = list(abandoned_folders(root))

    def remove(folder: Path) -> bool:
        if folder in abandoned:
            shutil.rmtree(folder)
            return True
        return remove_unused(folder, before_s)

    return remove_each("base outputs", [*unused, *abandoned], remove, settings.storage, dry_run=dry_run)


def remove_each(
    what: str,
    paths: Iterable[Path],
    remove: Callable[[Path], object],
    storage: Path,
    *,
    dry_run: bool,
    kept: Iterable[tuple[str, str]] = (),
) -> Pruned:
    """Call ``remove`` with each path; False means that it was not removed."""
    sizes: list[int] = []
    gone: list[str] = []
    problems: list[str] = []
    for path in list(paths):
        try:
            nbytes = size_of(path)
            if dry_run or remove(path) is not False:
                sizes.append(nbytes)
                gone.append(str(path.relative_to(storage)))
        except FileNotFoundError:  # another one has removed it
            continue
        except OSError as error:
            problems.append(f"{error.filename or path} cannot be removed: {error.strerror}")
    return Pruned(
        what=what,
        number=len(sizes),
        size_bytes=sum(sizes),
        problems=tuple(problems),
        paths=tuple(gone),
        kept=tuple(kept),
    )


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder. Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
