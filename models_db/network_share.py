"""SQLite on a network file system: one host may use it, with a warning; a second one is refused.

Writers of SQLite coordinate through locks and shared memory, which at best work within one host on such a file system.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from qbatch.core.errors import DatabaseOfAnotherHost, DatabaseUnreachable
from qbatch.core.file_stat import Mounts

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_NETWORK = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "panfs", "pvfs2"),
        *("orangefs", "glusterfs", "gfs2", "ocfs2", "wekafs", "fuse.glusterfs", "fuse.ceph", "fuse.sshfs", "fuse.s3fs"),
        *("fuse.gcsfuse", "fuse.rclone", "fuse.juicefs", "fuse.mfs", "fuse.cephfs", "fuse.blobfuse", "fuse.blobfuse2"),
    }
)
_REMEDY = (
    "set QBATCH_DATABASE_URL=sqlite:////a/local/disk/qbatch.db to use a local disk, or postgresql://… to use a server"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkShare:
    """An SQLite database on a network file system of the type ``file_system``.

    A host whose processes use it for longer than a command writes its name to ``<database>.host``, and renews that file
    within each lease.
    """

    file: Path
    file_system: str

    @property
    def warning(self) -> str:
        return (
            f"the database {self.file} is on a network file system ({self.file_system}): SQLite is slow there, and"
            f" at most one host may use it; {_REMEDY}"
        )

    def check(self, lease_s: float) -> None:
        """Raise DatabaseOfAnotherHost while another host uses it, or DatabaseUnreachable if that cannot be read."""
        try:
            self._holder(lease_s)
        except OSError as error:
            raise DatabaseUnreachable(f"{error.filename}: {error.strerror}") from error

    def hold(self, lease_s: float) -> None:
        """Claim the database for this host for the length of a lease. Raises as ``check`` does."""
        try:
            if self._holder(lease_s) == _this_kernel():
                os.utime(self._note)
            else:
                self._write_note()
        except OSError as error:
            raise DatabaseUnreachable(f"{error.filename}: {error.strerror}") from error

    @property
    def _note(self) -> Path:
        return self.file.with_name(f"{self.file.name}.host")

    def _holder(self, lease_s: float) -> str | None:
        """The boot id of the host that uses the database; None if no host has renewed its claim within a lease."""
        try:
            kernel, _, host = self._note.read_text().strip().partition(" ")
            noted_at = self._note.stat().st_mtime
        except FileNotFoundError:
            return None
        if kernel == _this_kernel():
            return kernel
        age_s = self._now() - noted_at
        if abs(age_s) >= lease_s:
            return None
        raise DatabaseOfAnotherHost(
            f"the database {self.file} is on a network file system ({self.file_system}), and host {host} is using it"
            f" (seen {max(age_s, 0.0):.0f} s ago): only one host may use SQLite there. Use qbatch on {host}, or stop it"
            f" there first; or {_REMEDY}"
        )

    def _now(self) -> float:
        """The time by the clock of the file system, which dates its files; the clocks of hosts may differ."""
        probe = self._partial()
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _write_note(self) -> None:
        partial = self._partial()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(f"{_this_kernel()} {socket.gethostname()}\n")
        partial.replace(self._note)

    def _partial(self) -> Path:
        return self._note.with_name(f"{self._note.name}.{secrets.token_hex(4)}")


def share_of(file: Path | None) -> NetworkShare | None:
    """The network file system on which ``file`` is or would be; None if it is local, or if ``file`` is None."""
    if file is None:
        return None
    real = file.resolve()
    mount = Mounts().of(str(real))
    if mount is None or mount.file_system not in _NETWORK:
        return None
    return NetworkShare(file=real, file_system=mount.file_system)


def _this_kernel() -> str:
    """An id of this host. Containers on one host share it, as they share its file locks."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
