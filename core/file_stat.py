"""One state of a file, told from another without reading it: what its file system says of it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

# As long as two changes of a file may lie apart and leave its times the same; FAT counts in two seconds.
TICK_NS = 2 * 10**9
# As far as a server's clock may be behind ours, where it cannot be asked.
_SKEW_NS = 3600 * 10**9
MOUNTS = Path("/proc/self/mountinfo")
# Their times are a server's. What a FUSE file system is, its name does not say.
_REMOTE = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "lustre", "gluster", "beegfs", "gpfs", "afs", "virtiofs", "gfs2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mounted file system: where, its type, and ``label``, what of it (type, source, the folder of it, its own
    options)."""

    point: str
    file_system: str
    label: str
    is_remote: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStat:
    """A file's place and state. ``path`` has no links in it; times are in ns, and no program can set ``ctime_ns``."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    mount: Mount | None = field(default=None, compare=False)

    @property
    def version(self) -> str:
        """What changes with the file's content, and is the same on every host that mounts its file system."""
        return f"{self.inode}:{self.size}:{self.mtime_ns}:{self.ctime_ns}"

    def is_settled(self, now_ns: int) -> bool:
        """Whether a change after ``now_ns`` (by the file system's clock, see ``clock_ns``) would give it another
        ``ctime_ns``. One that lies ahead is from a clock that was set back."""
        return self.ctime_ns < now_ns - TICK_NS


class Mounts:
    """The mounts that this process sees; none where the system does not list them."""

    def __init__(self) -> None:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines() if MOUNTS.exists() else []
        # Of two mounts at one place the later one hides the other.
        self._by_point = {mount.point: mount for mount in map(_mount, lines)}

    def of(self, path: str) -> Mount | None:
        """The mount that holds ``path``, which is absolute and without links."""
        place = path
        while place not in self._by_point and place != "/":
            place = os.path.dirname(place)  # noqa: PTH120
        return self._by_point.get(place)


def _mount(line: str) -> Mount:
    # man 5 proc: id parent device root point options [tags] - type source options; blanks are octal escapes.
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
    """The state of the file that ``path`` leads to. Opened for it, since a network mount asks its server then.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return stat_open(descriptor, path, mounts)
    finally:
        os.close(descriptor)


def stat_open(descriptor: int, path: Path, mounts: Mounts) -> FileStat:
    """The state of an open file. Raises OSError."""
    found = os.fstat(descriptor)
    real = os.path.realpath(path)
    return FileStat(
        path=real,
        device=found.st_dev,
        inode=found.st_ino,
        size=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
        mount=mounts.of(real),
    )


def clock_ns(stats: Iterable[FileStat]) -> int:
    """No more than what the clocks of the file systems of ``stats`` show now, in ns.

    A local one's is this machine's. A server's shows in the times of a file made there; where none can be made, its
    clock may be behind ours.
    """
    now_ns = time.time_ns()
    remote = {stat.mount.point: stat for stat in stats if stat.mount is not None and stat.mount.is_remote}
    return min([now_ns, *(_server_clock_ns(stat, now_ns) for stat in remote.values())])


def _server_clock_ns(stat: FileStat, now_ns: int) -> int:
    try:
        # Hidden: where it has a name, nobody is to take it for a file of the model.
        with TemporaryFile(dir=Path(stat.path).parent, prefix=".qbatch-") as probe:
            probe.write(b"?")
            probe.flush()
            return os.fstat(probe.fileno()).st_ctime_ns
    except OSError:
        return now_ns - _SKEW_NS
