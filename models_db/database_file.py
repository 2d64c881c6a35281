"""Notice when the file of an SQLite database is deleted or replaced while a process uses it."""

from __future__ import annotations

from pathlib import Path

from qbatch.core.errors import DatabaseReplaced


class DatabaseFile:
    """Remembers the inode of the file.

    Without this check, an open connection would continue on a deleted file, and the next one would create an empty one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode: tuple[int, int] | None = None

    def note(self) -> None:
        """Remember the file that exists now, unless one is remembered already."""
        if self._inode is None:
            self._inode = self._standing()

    def check(self) -> None:
        """Raise DatabaseReplaced unless the remembered file is still there."""
        if self._inode is None:
            return
        standing = self._standing()
        if standing == self._inode:
            return
        happened = "was deleted" if standing is None else "was replaced by another file"
        raise DatabaseReplaced(
            f"the database {self.path} {happened} while qbatch was using it, so qbatch stops using it: stop all of its"
            " processes, restore the file if you need it, and start again"
        )

    def _standing(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            # If the file system does not answer, nothing is known about the file; SQLite will report the error.
            return self._inode
        return found.st_dev, found.st_ino
