"""The file that an SQLite database lies in, as long as a process works on it."""

from __future__ import annotations

from pathlib import Path

from qbatch.core.errors import DatabaseReplaced


class DatabaseFile:
    """Knows its file again. A connection goes on with a file that was deleted; the next one would make an empty one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode: tuple[int, int] | None = None

    def note(self) -> None:
        """Remember the file that stands there now, unless one was remembered before."""
        if self._inode is None:
            self._inode = self._standing()

    def check(self) -> None:
        """Raises DatabaseReplaced unless the remembered file stands there."""
        if self._inode is None:
            return
        standing = self._standing()
        if standing == self._inode:
            return
        happened = "was deleted" if standing is None else "was replaced by another file"
        raise DatabaseReplaced(
            f"the database {self.path} {happened} while qbatch worked on it; nothing more is done on it: stop what"
            " runs, put the file back if it is missed, and start again"
        )

    def _standing(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            # A file system that does not answer says nothing about the file: SQLite will say what it meets.
            return self._inode
        return found.st_dev, found.st_ino
