"""The state of a file as its file system reports it: tells two versions of a file apart without reading them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

# Two changes of a file within this time may leave it with the same timestamps; those of FAT have a resolution of 2 s.
TICK_NS = 2 * 10**9
# These take times from the kernel's clock, which moves on every 10 ms or faster. A time with a part below a millisecond
# shows that they store all of it: ext4 with small inodes stores seconds. Twenty times as long, for a host that stalls.
FINE_TICK_NS = 2 * 10**8
_FINE = frozenset({"ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "overlay"})
# How far a server's clock is assumed to be behind ours if it cannot be read.
_SKEW_NS = 3600 * 10**9
MOUNTS = Path("/proc/self/mountinfo")
# File systems whose timestamps come from a server. FUSE is included because its name does not tell what is behind it.
_REMOTE = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "lustre", "gluster", "beegfs", "gpfs", "afs", "virtiofs", "gfs2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mounted file system.

    ``label`` identifies what is mounted: the type, the source, the folder of the source, and the options of the file
    system.
    """

    point: str
    file_system: str
    label: str
    is_remote: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStat:
    """A file's location and state. ``path`` contains no links. Times are in ns; no program can set ``ctime_ns``."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    mount: Mount | None = field(default=None, compare=False)

    @property
    def version(self) -> str:
        """Changes whenever the content changes, and is the same on every host that mounts the file system."""
        return f"{self.inode}:{self.size}:{self.mtime_ns}:{self.ctime_ns}"

    @property
    def tick_ns(self) -> int:
        """Two changes of the file within this time may leave it with the same ``ctime_ns``."""
        is_fine = self.mount is not None and self.mount.file_system in _FINE and self.ctime_ns % 10**6 != 0
        return FINE_TICK_NS if is_fine else TICK_NS

    def is_settled(self, now_ns: int) -> bool:
        """Whether any change after ``now_ns`` would give the file another ``ctime_ns``.

        ``now_ns`` is read from the file system's clock (see ``clock_ns``). A ctime in the future, left by a clock that
        was set back, does not count as settled.
        """
        return self.ctime_ns < now_ns - self.tick_ns


class Mounts:
    """The mounts visible to this process; empty if the system does not list them."""

    def __init__(self) -> None:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines() if MOUNTS.exists() else []
        # If two mounts share a mount point, the later one hides the earlier one.
        self._by_point = {mount.point: mount for mount in map(_mount, lines)}

    def of(self, path: str) -> Mount | None:
        """The mount that contains ``path``, which must be absolute and free of links."""
        folder = path
        while folder not in self._by_point and folder != "/":
            folder = os.path.dirname(folder)  # noqa: PTH120
        return self._by_point.get(folder)


def _mount(line: str) -> Mount:
    # man 5 proc: id parent device root point options [tags] - type source options; spaces are octal escapes.
    own, _, rest = line.partition(" - ")
    kind, source, options = rest.split(" ", 2)
    root, point = own.split(" ")[3:5]
    return Mount(
        point=re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), point),
        file_system=kind,
        label=f"{kind} {source} {root} {options}",
        is_remote=kind.startswith(_REMOTE),
    )


def stat_file(path: Path, mounts: Mounts) -> FileStat:
    """The state of the file at ``path``, with links followed. Raises OSError.

    The file is opened, because a network mount then asks its server instead of using cached attributes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return stat_open(descriptor, path, mounts)
    finally:
        os.close(descriptor)


def stat_open(descriptor: int, path: Path, mounts: Mounts) -> FileStat:
    """The state of an open file. Raises OSError."""
    result = os.fstat(descriptor)
    real = os.path.realpath(path)
    return FileStat(
        path=real,
        device=result.st_dev,
        inode=result.st_ino,
        size=result.st_size,
        mtime_ns=result.st_mtime_ns,
        ctime_ns=result.st_ctime_ns,
        mount=mounts.of(real),
    )


def clock_ns(stats: Iterable[FileStat]) -> int:
    """The earliest of the current times, in ns, of the file systems that hold ``stats``.

    A local file system uses this machine's clock. A server's clock is read from the ctime of a temporary file created
    next to the file. If that is not possible, the server is assumed to be an hour behind.
    """
    now_ns = time.time_ns()
    remote = {stat.mount.point: stat for stat in stats if stat.mount is not None and stat.mount.is_remote}
    return min([now_ns, *(_server_clock_ns(stat, now_ns) for stat in remote.values())])


def _server_clock_ns(stat: FileStat, now_ns: int) -> int:
    try:
        # A hidden name, so that nobody takes the file for part of the model while it exists.
        with TemporaryFile(dir=Path(stat.path).parent, prefix=".qbatch-") as probe:
            probe.write(b"?")
            probe.flush()
            return os.fstat(probe.fileno()).st_ctime_ns
    except OSError:
        return now_ns - _SKEW_NS
