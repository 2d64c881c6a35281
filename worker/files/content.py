"""The content of a set of files: hashed before they are used, and confirmed afterwards."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from qbatch.core.digest import Checksums, FileDigest, checksums, root_sha256
from qbatch.core.errors import SourceChanged
from qbatch.core.file_stat import FileStat, Mounts, clock_ns, stat_file, stat_open
from qbatch.worker.files.staging import storage_error

# How many files are open at once; a process may usually open about a thousand.
_OPEN_AT_ONCE = 256

Lister = Callable[[], Mapping[str, Path]]
"""Lists the files that exist now, by name."""


class DigestCache(Protocol):
    """Stores the checksums of files by their state."""

    def known(self, stats: Iterable[FileStat]) -> Mapping[FileStat, Checksums]: ...

    def remember(self, digests: Mapping[FileStat, Checksums]) -> None: ...


class NoDigestCache:
    """A cache that knows nothing, so that every file is hashed."""

    def known(self, stats: Iterable[FileStat]) -> Mapping[FileStat, Checksums]:  # noqa: ARG002
        return {}

    def remember(self, digests: Mapping[FileStat, Checksums]) -> None:
        """Store nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedFile:
    """A file and its checksums in the state ``stat``.

    If it is not ``settled``, it had changed so shortly before the hashing that a later change might not show in its
    times.
    """

    name: str
    path: Path
    stat: FileStat
    checksums: Checksums
    settled: bool

    @property
    def digest(self) -> FileDigest:
        return FileDigest(name=self.name, size=self.stat.size, chunk_sha256=self.checksums.chunk_sha256)


class Content:
    """A set of files with the content that they had when they were hashed. ``root_sha256`` identifies it."""

    def __init__(self, files: Iterable[HashedFile], lister: Lister, cache: DigestCache) -> None:
        self._files = tuple(files)
        self._lister = lister
        self._cache = cache

    @property
    def files(self) -> tuple[HashedFile, ...]:
        return self._files

    @property
    def root_sha256(self) -> str:
        return root_sha256(file.digest for file in self._files)

    @property
    def versions(self) -> dict[str, str]:
        """The state in which each file has this content; "" if its times cannot tell."""
        return {file.name: file.stat.version if file.settled else "" for file in self._files}

    def confirm(self) -> None:
        """Raise SourceChanged unless everything read from the files since they were hashed was this content.

        Files whose times have changed, or are too recent to tell, are hashed again. A file that was written to counts
        as changed even if it has the same content now, because it may have had another one while it was used. Raises
        StorageError if the files cannot be checked.
        """
        mounts = Mounts()
        try:
            now = {name: (path, stat_file(path, mounts)) for name, path in self._lister().items()}
        except FileNotFoundError as error:
            raise SourceChanged(f"{error.filename} was removed while it was used") from error
        except OSError as error:
            raise storage_error(error, "cannot check the files again") from error
        _refuse_others({file.name for file in self._files}, now.keys())
        for file in self._files:
            _refuse_written(file, now[file.name][1])
        uncertain = {f.name: f.path for f in self._files if not f.settled or f.stat != now[f.name][1]}
        if uncertain:
            _wait_until_settled([now[name][1] for name in uncertain])
            again = {file.name: file for file in hash_files(uncertain, self._cache, use_known=False)}
            for file in self._files:
                if file.name in again and again[file.name].digest != file.digest:
                    raise SourceChanged(f"{file.path} changed while it was used")
            self._files = tuple(again.get(file.name, file) for file in self._files)


def _refuse_others(before: Iterable[str], now: Iterable[str]) -> None:
    differing = sorted(set(before) ^ set(now))
    if differing:
        raise SourceChanged(f"{differing[0]} was added or removed while the model was used")


def _is_unwritten(before: FileStat, now: FileStat) -> bool:
    """Whether only the ctime differs: it changes when a file gets another link or another mode."""
    return replace(now, ctime_ns=before.ctime_ns) == before


def _refuse_written(file: HashedFile, now: FileStat) -> None:
    if not _is_unwritten(file.stat, now):
        raise SourceChanged(f"{file.path} was modified while it was used")


def _wait_until_settled(stats: Sequence[FileStat]) -> None:
    """Wait until the files have settled, so that they need not be hashed once more. Ignores times in the future."""
    now_ns = clock_ns(stats)
    ages_ns = [(now_ns - stat.ctime_ns, stat.tick_ns) for stat in stats]
    time.sleep(max((tick_ns - age_ns + 1 for age_ns, tick_ns in ages_ns if 0 <= age_ns <= tick_ns), default=0) / 1e9)


def hash_content(
    lister: Lister,
    cache: DigestCache,
    *,
    whole: Callable[[str], bool] = lambda _: False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Content:
    """Hash the files that ``lister`` lists, except those whose current state ``cache`` knows.

    ``whole`` tells for which names the sha256 of the whole file is needed too. ``on_progress(bytes_done, bytes_total)``
    is called during the hashing, by one thread at a time. Raises SourceChanged if a file changes meanwhile,
    StorageError, and what ``lister`` raises.
    """
    return Content(hash_files(lister(), cache, whole=whole, on_progress=on_progress), lister, cache)


def hash_files(
    files: Mapping[str, Path],
    cache: DigestCache,
    *,
    use_known: bool = True,
    whole: Callable[[str], bool] = lambda _: False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[HashedFile]:
    """Hash the named files, reading each at most once. The checksums of settled files are stored in ``cache``."""
    try:
        return _hash_files(files, cache, use_known=use_known, whole=whole, on_progress=on_progress)
    except FileNotFoundError as error:
        raise SourceChanged(f"{error.filename} was removed while it was read") from error
    except OSError as error:
        raise storage_error(error, "cannot hash the files") from error


def _hash_files(
    files: Mapping[str, Path],
    cache: DigestCache,
    *,
    use_known: bool,
    whole: Callable[[str], bool],
    on_progress: Callable[[int, int], None],
) -> list[HashedFile]:
    mounts = Mounts()
    stats = {name: stat_file(path, mounts) for name, path in files.items()}
    known = cache.known(stats.values()) if use_known else {}
    usable = {
        name: known[stat]
        for name, stat in stats.items()
        if stat in known and (known[stat].sha256 is not None or not whole(name))
    }
    already_hashed = [
        HashedFile(name=name, path=files[name], stat=stats[name], checksums=sums, settled=True)
        for name, sums in usable.items()
    ]
    fresh = _read({name: path for name, path in files.items() if name not in usable}, mounts, whole, on_progress)
    cache.remember({file.stat: file.checksums for file in fresh if file.settled})
    return sorted([*already_hashed, *fresh], key=lambda file: file.name)


def _read(
    files: Mapping[str, Path],
    mounts: Mounts,
    whole: Callable[[str], bool],
    on_progress: Callable[[int, int], None],
) -> list[HashedFile]:
    # The largest first: a group that is opened at once is hashed together.
    sizes = {name: path.stat().st_size for name, path in files.items()}
    order = sorted(files, key=lambda name: -sizes[name])
    count = _counter(on_progress, sum(sizes.values()))
    groups = (order[start : start + _OPEN_AT_ONCE] for start in range(0, len(order), _OPEN_AT_ONCE))
    return [
        hashed
        for group in groups
        for hashed in _read_group({name: files[name] for name in group}, mounts, whole, count)
    ]


def _read_group(
    files: Mapping[str, Path], mounts: Mounts, whole: Callable[[str], bool], count: Callable[[int], None]
) -> list[HashedFile]:
    with ExitStack() as opened:
        descriptors = {}
        for name, path in files.items():
            descriptors[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, descriptors[name])
        before = {name: stat_open(descriptors[name], path, mounts) for name, path in files.items()}
        now_ns = clock_ns(before.values())
        sums = checksums(
            [(descriptors[name], stat.size) for name, stat in before.items()],
            whole={descriptors[name] for name in files if whole(name)},
            on_bytes=count,
        )
    # Looked up by name again, because another file may have replaced the one that was read.
    after = {name: stat_file(path, mounts) for name, path in files.items()}
    for name, path in files.items():
        if not _is_unwritten(before[name], after[name]):
            raise SourceChanged(f"{path} changed while it was read")
    return [
        HashedFile(
            name=name,
            path=path,
            stat=before[name],
            checksums=file_checksums,
            settled=before[name].is_settled(now_ns) and after[name] == before[name],
        )
        for (name, path), file_checksums in zip(files.items(), sums, strict=True)
    ]


def _counter(on_progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    done, lock = 0, threading.Lock()

    def count(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            on_progress(min(done, total), total)

    return count
