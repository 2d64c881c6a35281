"""What file systems refuse: mounts of object stores, CIFS, some of FUSE. What is not needed is done without, and told;
what is needed is asked for beforehand."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from qbatch.core.errors import DiskFull, StorageError, StorageUnavailable

CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""How a file system says that it cannot do something at all."""
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
IS_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST})
"""How a rename of a folder finds another one in its place."""
_REFUSED = CANNOT | {errno.EPERM, errno.EACCES, errno.EISDIR}
_NO_LOCKS = CANNOT | {errno.ENOLCK}


def storage_fault(error: OSError) -> type[DiskFull] | type[StorageError]:
    """What an error of the shared storage, or of a cache, is to a job."""
    return DiskFull if error.errno in NO_ROOM else StorageError


class Refusal(StrEnum):
    """What can be done without. The values stand in manifests."""

    SYNC_FILE = "fsync of a file"
    SYNC_FOLDER = "fsync of a folder"
    MODE = "chmod"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpace:
    """Bytes of a file system: what it could ever give us, and what it would give us now."""

    capacity: int
    free: int


def disk_space(folder: Path) -> DiskSpace | None:
    """None where the file system does not say. Raises OSError."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError as error:
        if error.errno in _REFUSED:
            return None
        raise
    # Not its total, of which some may be reserved for root.
    return DiskSpace(capacity=disk.used + disk.free, free=disk.free) if disk.total else None


def sync(*paths: Path) -> frozenset[Refusal]:
    """Put files and folders on the disk: a rename that outlives a power cut must not be of files that do not.

    Returns what the file system refuses to do. Raises OSError for what it fails to do.
    """
    return frozenset(refusal for path in paths if (refusal := _sync(path)) is not None)


def _sync(path: Path) -> Refusal | None:
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # A file that may not be opened is no matter of the file system's.
        if error.errno not in _REFUSED or (not is_folder and error.errno == errno.EACCES):
            raise
        return Refusal.SYNC_FOLDER if is_folder else Refusal.SYNC_FILE
    return None


def share(path: Path) -> Refusal | None:
    """Give a file the permissions that one made plainly has: safetensors makes 0600, useless on shared storage.

    None is taken away, since a folder's default ACL may have given more. Raises OSError.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    wanted = mode | (0o666 & ~umask())
    if wanted == mode:
        return None
    try:
        path.chmod(wanted)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return Refusal.MODE
    return None


def umask() -> int:
    """This process's, which other threads make files by meanwhile: it is not changed to look at it, where that can be
    helped."""
    try:
        found = re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def touch(path: Path) -> None:
    """Mark a file as used just now, where the file system lets us: another user's file may not be ours to touch."""
    try:
        os.utime(path)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def move(source: Path, target: Path) -> None:
    """Rename. A rename that was done, and whose reply was lost, counts as done: the second try of a network's client
    finds nothing to move. Raises OSError."""
    try:
        source.rename(target)
    except OSError:
        if os.path.lexists(source) or not os.path.lexists(target):
            raise


def probe(folder: Path) -> frozenset[Refusal]:
    """Try in ``folder`` what checkpoints need; what of it is refused and can be done without. Leaves nothing behind.

    Raises StorageUnavailable, in one line, for what cannot. A disk without room is not judged.
    """
    place = folder / f".probe-{uuid.uuid4().hex[:12]}"
    try:
        return _probe(folder, place)
    except OSError as error:
        if error.errno in NO_ROOM:
            return frozenset()
        raise StorageUnavailable(f"{error.filename or folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _probe(folder: Path, place: Path) -> frozenset[Refusal]:
    made, file = place / "made", place / "made" / "file"
    made.mkdir(parents=True)
    with _needed(folder, "write a file at any place of it"):
        _write_backwards(file)
    with _needed(folder, "map a file into memory"):
        _map(file)
    found = sync(file, made) | _set_mode(file)
    with _needed(folder, "rename a folder"):
        move(made, place / "published")
    made.mkdir()
    file.touch()
    with _needed(folder, "refuse to replace a folder that is not empty by another one"):
        _expect_refusal(made, place / "published")
    return found


@contextmanager
def _needed(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise StorageUnavailable(
            f"{folder}: its file system cannot {what} ({error.strerror}), which publishing a checkpoint needs"
        ) from error


def _write_backwards(path: Path) -> None:
    """As several widths of a model are written: not from the beginning to the end, and read again meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for offset in (4096, 0):
            os.pwrite(descriptor, b"probe", offset)
        if os.pread(descriptor, 5, 4096) != b"probe":
            raise OSError(errno.EIO, "what was written is not what is read")
    finally:
        os.close(descriptor)


def _map(path: Path) -> None:
    """As safetensors reads what was published."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        pass


def _set_mode(file: Path) -> frozenset[Refusal]:
    try:
        file.chmod(0o600)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return frozenset({Refusal.MODE})
    return frozenset({refusal} if (refusal := share(file)) is not None else ())


def _expect_refusal(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in IS_TAKEN:
            raise
        return
    raise OSError(errno.ENOTEMPTY, "it was replaced")


def require_locks(folder: Path, what: str, variable: str) -> None:
    """Raises StorageUnavailable, in one line, where files in ``folder`` cannot be locked, which ``what`` needs.

    A folder that cannot be made or written is not judged: perhaps nobody needs it.
    """
    path = folder / f".lock-probe-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise no_locks(folder, error, what, variable) from error
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def no_locks(folder: Path, error: OSError, what: str, variable: str) -> StorageUnavailable:
    return StorageUnavailable(
        f"{folder}: its file system has no locks ({error.strerror}), which {what} needs: set {variable} to a folder on "
        "a local disk"
    )
