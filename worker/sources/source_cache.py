"""Downloaded sources on the node's own disk: bounded, shared by its processes, least recently used out first."""

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

# Its own folder of locks and plans: what has no lock here was not put in the cache by us, and is never removed.
_STATE = ".state"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCache:
    """Entries are folders ``root/<name>``; ``limit_bytes`` bounds them all together.

    For every entry ``.state`` holds a ``.use`` lock (shared by its users, exclusive to remove it), a ``.fill`` lock
    (exclusive to download into it), and a plan: the size in bytes of each file that it is to hold. The plan is the
    reservation of its room, and the entry is complete when every file of it has that size. The kernel drops the
    locks of a process that dies, so what it left half-done is resumed or removed like anything else.
    """

    root: Path
    limit_bytes: int

    @contextmanager
    def using(self, name: str) -> Iterator[Path]:
        """The entry's folder, complete or not: nobody removes it meanwhile."""
        with self._locked(f"{name}.use", fcntl.LOCK_SH):
            self._touch(name)
            try:
                yield self.root / name
            finally:
                self._touch(name)

    @contextmanager
    def filling(self, name: str) -> Iterator[None]:
        """The sole right to write into an entry in use; waits while another process has it."""
        with self._locked(f"{name}.fill", fcntl.LOCK_EX):
            yield

    def is_complete(self, name: str) -> bool:
        files = self.plan(name)
        return bool(files) and all(_size(self.root / name / file) == size for file, size in files.items())

    def plan(self, name: str) -> dict[str, int]:
        """File name → bytes, of what the entry is to hold; empty while that is unknown."""
        try:
            files: dict[str, int] = json.loads(self._state(f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):  # a plan that a power cut left unreadable is no plan
            return {}
        return files

    def root_sha256(self, name: str) -> str | None:
        """What ``set_root`` was told last of the entry's content."""
        try:
            return self._state(f"{name}.root").read_text()
        except FileNotFoundError:
            return None

    def set_root(self, name: str, root_sha256: str) -> None:
        """Note the content of an entry that was just filled."""
        draft = self._state(f"{name}.root.new")
        draft.write_text(root_sha256)
        draft.replace(self._state(f"{name}.root"))

    def forget(self, name: str) -> None:
        """Take an entry in use for not complete: its content is not what it was."""
        self._state(f"{name}.json").unlink(missing_ok=True)

    def held_bytes(self, name: str) -> int:
        """What the entry takes on the disk, half-downloaded files and all."""
        folder = self.root / name
        return sum(_size(Path(at) / file) or 0 for at, _, files in os.walk(folder) for file in files)

    def reserve(self, name: str, files: Mapping[str, int]) -> None:
        """Make room for an entry in use, and set its plan: file name → bytes.

        Raises Unsupported where the cache could never hold it, StorageError where its disk could not, DiskFull where
        the entries in use leave no room.
        """
        needed = sum(files.values())
        if needed > self.limit_bytes:
            raise Unsupported(
                f"{name}: {needed} bytes exceed the source cache of {self.limit_bytes}; raise QBATCH_CACHE_BYTES"
            )
        room = disk_space(self.root)
        if room is not None and needed > room.capacity:
            raise StorageError(
                f"{name}: {needed} bytes exceed the disk of the source cache; set QBATCH_CACHE to a larger one"
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
        for other in sorted(bytes_of, key=self._worth):
            if self._fits(used + needed, missing):
                return
            if self._evict(other):
                used -= bytes_of[other]
        if not self._fits(used + needed, missing):
            raise DiskFull(
                f"no room for the {needed} bytes of {name}: sources in use hold {used} of the cache's "
                f"{self.limit_bytes}, and its disk has {self._free_bytes()} free",
                needed,
            )

    def _fits(self, total: int, missing: int) -> bool:
        return total <= self.limit_bytes and missing <= self._free_bytes()

    def _free_bytes(self) -> int:
        """What its limit leaves room for, where the disk does not say."""
        room = disk_space(self.root)
        return self.limit_bytes if room is None else room.free

    def _names(self) -> list[str]:
        return [lock.stem for lock in self._state("").glob("*.use")]

    def _claimed_bytes(self, name: str) -> int:
        if not (self.root / name).is_dir():
            return 0
        return max(self.held_bytes(name), sum(self.plan(name).values()))

    def _worth(self, name: str) -> tuple[bool, int]:
        """Order of removal: downloads that were given up first, then by last use."""
        try:
            used_at_ns = self._state(f"{name}.json").stat().st_mtime_ns
        except FileNotFoundError:
            used_at_ns = 0
        return self.is_complete(name), used_at_ns

    def _evict(self, name: str) -> bool:
        """Whether the entry is gone; False where a process uses it."""
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
