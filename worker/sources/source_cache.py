"""A cache of downloaded sources, shared by the processes of a machine. The least recently used are removed first."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qbatch.core.errors import DiskFull, StorageError, Unsupported
from qbatch.core.filesystem import disk_space, move, touch

# The folder of locks and plans. A folder without a lock here was not created by the cache, and is never removed.
_STATE = ".state"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCache:
    """Entries are folders ``root/<name>``; their total size is at most ``limit_bytes``.

    For every entry, ``.state`` contains a ``.use`` lock (shared by its users, exclusive to remove it), a ``.fill`` lock
    (exclusive to download into it), and a plan: the size in bytes of each of its files. The plan reserves the space,
    and the entry is complete when every file has the planned size. The kernel releases the locks of a process that
    dies, so an unfinished entry is resumed or removed like any other.
    """

    root: Path
    limit_bytes: int

    @contextmanager
    def using(self, name: str) -> Iterator[Path]:
        """Keep an entry, complete or not, from being removed. Yields its folder."""
        with self._locked(f"{name}.use", fcntl.LOCK_SH):
            self._touch(name)
            try:
                yield self.root / name
            finally:
                self._touch(name)

    @contextmanager
    def filling(self, name: str) -> Iterator[None]:
        """Lock an entry in use for writing. Waits while another process holds the lock."""
        with self._locked(f"{name}.fill", fcntl.LOCK_EX):
            yield

    def is_complete(self, name: str) -> bool:
        files = self.plan(name)
        return bool(files) and all(_size(self.root / name / file) == size for file, size in files.items())

    def plan(self, name: str) -> dict[str, int]:
        """The planned files of the entry, file name → bytes; empty while they are unknown."""
        try:
            files: dict[str, int] = json.loads(self._state(f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):  # a power cut may leave an unreadable plan
            return {}
        return files

    def root_sha256(self, name: str) -> str | None:
        """The root hash of the entry's content that ``set_root`` has stored, or None."""
        try:
            return self._state(f"{name}.root").read_text()
        except FileNotFoundError:
            return None

    def set_root(self, name: str, root_sha256: str) -> None:
        """Store the root hash of an entry that was just filled."""
        draft = self._state(f"{name}.root.new")
        draft.write_text(root_sha256)
        draft.replace(self._state(f"{name}.root"))

    def forget(self, name: str) -> None:
        """Mark an entry in use as incomplete, because its content has changed."""
        self._state(f"{name}.json").unlink(missing_ok=True)

    def held_bytes(self, name: str) -> int:
        """The bytes that the entry takes on disk, including unfinished downloads."""
        folder = self.root / name
        return sum(_size(Path(at) / file) or 0 for at, _, files in os.walk(folder) for file in files)

    def reserve(self, name: str, files: Mapping[str, int]) -> None:
        """Make space for an entry in use, and store its plan: file name → bytes.

        Raises Unsupported if the entry exceeds the cache's limit, StorageError if it exceeds the disk, and DiskFull if
        the entries in use leave too little space.
        """
        needed = sum(files.values())
        if needed > self.limit_bytes:
            raise Unsupported(
                f"{name} needs {needed} bytes, and the source cache has {self.limit_bytes}: raise QBATCH_CACHE_BYTES"
            )
        room = disk_space(self.root)
        if room is not None and needed > room.capacity:
            raise StorageError(
                f"{name} needs {needed} bytes, more than the disk of the source cache: set QBATCH_CACHE to a larger one"
            )
        with self._locked("room", fcntl.LOCK_EX):
            self._make_room(name, needed)
            draft = self._state(f"{name}.json.new")
            draft.write_text(json.dumps(dict(files)))
            move(draft, self._state(f"{name}.json"))

    def _make_room(self, name: str, needed: int) -> None:
        bytes_of = {other: self._claimed_bytes(other) for other in self._names() if other != name}
        used = sum(bytes_of.values())
        missing = needed - self.held_bytes(name)
        for other in sorted(bytes_of, key=self._removal_order):
            if self._fits(used + needed, missing):
                return
            if self._evict(other):
                used -= bytes_of[other]
        if not self._fits(used + needed, missing):
            raise DiskFull(
                f"there is no space for the {needed} bytes of {name}: sources in use take {used} of the cache's "
                f"{self.limit_bytes}, and its disk has {self._free_bytes()} free",
                needed,
            )

    def _fits(self, total: int, missing: int) -> bool:
        return total <= self.limit_bytes and missing <= self._free_bytes()

    def _free_bytes(self) -> int:
        """The free bytes of the disk, or the limit of the cache if the disk does not report any."""
        room = disk_space(self.root)
        return self.limit_bytes if room is None else room.free

    def _names(self) -> list[str]:
        return [lock.stem for lock in self._state("").glob("*.use")]

    def _claimed_bytes(self, name: str) -> int:
        if not (self.root / name).is_dir():
            return 0
        return max(self.held_bytes(name), sum(self.plan(name).values()))

    def _removal_order(self, name: str) -> tuple[bool, int]:
        """Sort key: incomplete downloads come first, then the least recently used entries."""
        try:
            used_at_ns = self._state(f"{name}.json").stat().st_mtime_ns
        except FileNotFoundError:
            used_at_ns = 0
        return self.is_complete(name), used_at_ns

    def _evict(self, name: str) -> bool:
        """Remove an entry. Returns False if a process is using it."""
        try:
            with self._locked(f"{name}.use", fcntl.LOCK_EX | fcntl.LOCK_NB):
                self.forget(name)
                if (self.root / name).exists():
                    shutil.rmtree(self.root / name)
        except BlockingIOError:
            return False
        return True

    def _touch(self, name: str) -> None:
        plan = self._state(f"{name}.json")
        if plan.exists():
            touch(plan)

    def _state(self, file: str) -> Path:
        return self.root / _STATE / file

    @contextmanager
    def _locked(self, file: str, operation: int) -> Iterator[None]:
        path = self._state(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, operation)
            yield
        finally:
            os.close(descriptor)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
