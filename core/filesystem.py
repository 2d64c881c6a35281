"""File operations on file systems that support only some of them: object-store mounts, CIFS, some FUSE file systems.

An unsupported operation that is not essential is skipped and reported; support for essential ones is probed beforehand.
"""

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

UNSUPPORTED_ERRNOS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""How a file system says that it cannot do something at all."""
NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
OCCUPIED_ERRNOS = frozenset({errno.ENOTEMPTY, errno.EEXIST})
"""How a rename of a folder finds another one in its place."""
_REFUSED = UNSUPPORTED_ERRNOS | {errno.EPERM, errno.EACCES, errno.EISDIR}
_NO_LOCKS = UNSUPPORTED_ERRNOS | {errno.ENOLCK}


def storage_fault(error: OSError) -> type[DiskFull] | type[StorageError]:
    """What an error of the shared storage, or of a cache, is to a job."""
    return DiskFull if error.errno in NO_SPACE_ERRNOS else StorageError


class Refusal(StrEnum):
    """An operation that the file system refused and that qbatch can do without. The values are stored in manifests."""

    SYNC_FILE = "fsync of a file"
    SYNC_FOLDER = "fsync of a folder"
    MODE = "chmod"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpace:
    """Bytes of a file system available to us: ``capacity`` if it were empty, and ``free`` now."""

    capacity: int
    free: int


def disk_space(folder: Path) -> DiskSpace | None:
    """The disk space of the file system that holds ``folder``; None if it does not report any. Raises OSError."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError as error:
        if error.errno in _REFUSED:
            return None
        raise
    # Not ``total``, part of which may be reserved for root.
    return DiskSpace(capacity=disk.used + disk.free, free=disk.free) if disk.total else None


def sync(*paths: Path) -> frozenset[Refusal]:
    """Flush files and folders to disk, so that a later rename cannot survive a power cut without their content.

    Returns the operations that the file system does not support. Raises OSError if one fails.
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
        # A file that may not be opened is a matter of permissions, not of what the file system supports.
        if error.errno not in _REFUSED or (not is_folder and error.errno == errno.EACCES):
            raise
        return Refusal.SYNC_FOLDER if is_folder else Refusal.SYNC_FILE
    return None


def add_default_permissions(path: Path) -> Refusal | None:
    """Give a file the permissions of a newly created one. safetensors creates files with 0600, too strict to share.

    Permissions are only added, because the folder's default ACL may have granted more. Raises OSError.
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
    """The umask of this process.

    Read from /proc where possible: os.umask() can only read it by changing it, which affects other threads.
    """
    try:
        match = re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match is not None:
        return int(match[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def touch(path: Path) -> None:
    """Set a file's times to now if that is permitted; it may not be for another user's file."""
    try:
        os.utime(path)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def move(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``. Raises OSError.

    A network client that lost the server's reply tries again and finds no source; such a rename counts as done.
    """
    try:
        source.rename(target)
    except OSError:
        if os.path.lexists(source) or not os.path.lexists(target):
            raise


def why_unusable(error: OSError) -> str:
    """The place and the reason, for an error that came of making or using a folder."""
    # Where a folder is to be made, the system says of a file no more than that it exists.
    is_file = isinstance(error, FileExistsError) and Path(error.filename).is_file()
    return f"{error.filename}: {'it is a file, not a folder' if is_file else error.strerror}"


def probe(folder: Path) -> frozenset[Refusal]:
    """Try in ``folder`` every operation that publishing a checkpoint uses, and leave nothing behind.

    Returns the unsupported operations that qbatch can do without. Raises StorageUnavailable, with a one-line message,
    if an essential one is not supported. A full disk passes, because it says nothing about the file system.
    """
    scratch = folder / f".probe-{uuid.uuid4().hex[:12]}"
    try:
        return _probe(folder, scratch)
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            return frozenset()
        raise StorageUnavailable(f"{error.filename or folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _probe(folder: Path, scratch: Path) -> frozenset[Refusal]:
    staged, file = scratch / "staged", scratch / "staged" / "file"
    staged.mkdir(parents=True)
    with _essential(folder, "write to a file at any offset"):
        _write_backwards(file)
    with _essential(folder, "map a file into memory"):
        _map(file)
    refusals = sync(file, staged) | _set_mode(file)
    with _essential(folder, "rename a folder"):
        move(staged, scratch / "published")
    staged.mkdir()
    file.touch()
    with _essential(folder, "refuse to replace a folder that is not empty"):
        _expect_refusal(staged, scratch / "published")
    return refusals


@contextmanager
def _essential(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            raise
        raise StorageUnavailable(
            f"{folder}: its file system cannot {what} ({error.strerror}), which publishing a checkpoint requires"
        ) from error


def _write_backwards(path: Path) -> None:
    """Write the end of a file first and read it back, as quantizing does when it writes several widths at once."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for offset in (4096, 0):
            os.pwrite(descriptor, b"probe", offset)
        if os.pread(descriptor, 5, 4096) != b"probe":
            raise OSError(errno.EIO, "the bytes read back differ from those written")
    finally:
        os.close(descriptor)


def _map(path: Path) -> None:
    """Map a file into memory, as safetensors does to read a checkpoint."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        pass


def _set_mode(file: Path) -> frozenset[Refusal]:
    try:
        file.chmod(0o600)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return frozenset({Refusal.MODE})
    return frozenset({refusal} if (refusal := add_default_permissions(file)) is not None else ())


def _expect_refusal(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in OCCUPIED_ERRNOS:
            raise
        return
    raise OSError(errno.ENOTEMPTY, "it was replaced")


def require_locks(folder: Path, what: str, variable: str) -> None:
    """Raise StorageUnavailable, with a one-line message, if files in ``folder`` cannot be locked, as ``what`` needs.

    A folder that cannot be created or written passes: it may not be needed.
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
        f"{folder}: its file system does not support locks ({error.strerror}), which {what} needs: set {variable} to a "
        "folder on a local disk"
    )
