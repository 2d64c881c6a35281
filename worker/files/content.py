"""The content of a set of files: hashed before they are used, and confirmed after."""

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
from qbatch.core.file_stat import TICK_NS, FileStat, Mounts, clock_ns, stat_file, stat_open
from qbatch.worker.files.staging import storage_error

# Of the files of one model; a process may have a thousand.
_OPEN_AT_ONCE = 256

Lister = Callable[[], Mapping[str, Path]]
"""The files as they are now, by name."""


class DigestCache(Protocol):
    """Digests by the state in which a file had them."""

    def known(self, stats: Iterable[FileStat]) -> Mapping[FileStat, Checksums]: ...

    def remember(self, digests: Mapping[FileStat, Checksums]) -> None: ...


class NoDigestCache:
    """Everything is hashed."""

    def known(self, stats: Iterable[FileStat]) -> Mapping[FileStat, Checksums]:  # noqa: ARG002
        return {}

    def remember(self, digests: Mapping[FileStat, Checksums]) -> None:
        """Nothing is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedFile:
    """A file and what it held in the state ``stat``. Where it is not ``settled``, it had changed so shortly before it
    was hashed that a later change might not show in its times."""

    name: str
    path: Path
    stat: FileStat
    checksums: Checksums
    settled: bool

    @property
    def digest(self) -> FileDigest:
        return FileDigest(name=self.name, size=self.stat.size, chunk_sha256=self.checksums.chunk_sha256)


class Content:
    """Files as they were when they were hashed: ``root_sha256`` is their identity."""

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
        """Of each file the state in which it has this content; "" where its times cannot tell."""
        return {file.name: file.stat.version if file.settled else "" for file in self._files}

    def confirm(self) -> None:
        """Raises SourceChanged unless all that was read of the files since they were hashed was this content, and
        StorageError where that cannot be told.

        Files whose times are not as they were, or too young to tell, are hashed again. A file that was written is a
        changed one whatever it holds now: what was used may have been something else.
        """
        mounts = Mounts()
        try:
            now = {name: (path, stat_file(path, mounts)) for name, path in self._lister().items()}
        except FileNotFoundError as error:
            raise SourceChanged(f"{error.filename} went away while it was used") from error
        except OSError as error:
            raise storage_error(error, "cannot look at the files again") from error
        _refuse_others({file.name for file in self._files}, now.keys())
        for file in self._files:
            _refuse_written(file, now[file.name][1])
        doubtful = {f.name: f.path for f in self._files if not f.settled or f.stat != now[f.name][1]}
        if doubtful:
            _let_settle([now[name][1] for name in doubtful])
            again = {file.name: file for file in hash_files(doubtful, self._cache, use_known=False)}
            for file in self._files:
                if file.name in again and again[file.name].digest != file.digest:
                    raise SourceChanged(f"{file.path} changed while it was used")
            self._files = tuple(again.get(file.name, file) for file in self._files)


def _refuse_others(before: Iterable[str], now: Iterable[str]) -> None:
    differing = sorted(set(before) ^ set(now))
    if differing:
        raise SourceChanged(f"{differing[0]} came or went while the model was used")


def _is_unwritten(before: FileStat, now: FileStat) -> bool:
    """A link made to a file, or another mode, changes its ctime alone."""
    return replace(now, ctime_ns=before.ctime_ns) == before


def _refuse_written(file: HashedFile, now: FileStat) -> None:
    if not _is_unwritten(file.stat, now):
        raise SourceChanged(f"{file.path} was written while it was used")


def _let_settle(stats: Sequence[FileStat]) -> None:
    """Wait for as long as it takes until what is hashed now need not be hashed again; not for a clock ahead of ours."""
    youngest_ns = clock_ns(stats) - max(stat.ctime_ns for stat in stats)
    if 0 <= youngest_ns <= TICK_NS:
        time.sleep((TICK_NS - youngest_ns + 1) / 1e9)


def hash_content(
    lister: Lister,
    cache: DigestCache,
    *,
    whole: Callable[[str], bool] = lambda _: False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Content:
    """The content of the files that ``lister`` lists, hashed where ``cache`` does not know them as they are.

    ``whole`` says of which names the one sha256 of the whole file is wanted. ``on_progress(bytes_done, bytes_total)``
    is called while something is hashed, by one thread at a time. Raises SourceChanged for a file that changes
    meanwhile, StorageError, and what ``lister`` raises.
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
    """The named files, each read once where it has to be. What is settled is remembered."""
    try:
        return _hash_files(files, cache, use_known=use_known, whole=whole, on_progress=on_progress)
    except FileNotFoundError as error:
        raise SourceChanged(f"{error.filename} went away while it was read") from error
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
    found = [
        HashedFile(name=name, path=files[name], stat=stats[name], checksums=sums, settled=True)
        for name, sums in usable.items()
    ]
    fresh = _read({name: path for name, path in files.items() if name not in usable}, mounts, whole, on_progress)
    cache.remember({file.stat: file.checksums for file in fresh if file.settled})
    return sorted([*found, *fresh], key=lambda file: file.name)


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
        found for group in groups for found in _read_group({name: files[name] for name in group}, mounts, whole, count)
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
    # By their names: what was read may have been replaced by another file.
    after = {name: stat_file(path, mounts) for name, path in files.items()}
    for name, path in files.items():
        if not _is_unwritten(before[name], after[name]):
            raise SourceChanged(f"{path} changed while it was read")
    return [
        HashedFile(
            name=name,
            path=path,
            stat=before[name],
            checksums=found,
            settled=before[name].is_settled(now_ns) and after[name] == before[name],
        )
        for (name, path), found in zip(files.items(), sums, strict=True)
    ]


def _counter(on_progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    done, lock = 0, threading.Lock()

    def count(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            on_progress(min(done, total), total)

    return count
