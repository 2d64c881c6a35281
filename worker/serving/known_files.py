"""The checksums of files that are on record in the database, for the processes that hash files."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from qbatch.core.digest import Checksums
from qbatch.core.errors import DatabaseUnreachable
from qbatch.core.file_stat import FileStat
from qbatch.models_db import file_digests
from qbatch.models_db.session import Database
from qbatch.worker.runner.messages import FilesHashed, FilesSeen

log = logging.getLogger("qbatch.worker")


class KnownFiles:
    """Looks checksums up and records them. Without the database, files are hashed again."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def known(self, seen: FilesSeen) -> Mapping[FileStat, Checksums]:
        try:
            with self._database.read() as session:
                self._database.require_own(session)
                return file_digests.known(session, seen.stats)
        except DatabaseUnreachable as error:
            log.warning("%s; hashing all files", error)
            return {}

    def remember(self, hashed: FilesHashed) -> None:
        try:
            with self._database.write() as session:
                self._database.require_own(session)
                file_digests.remember(session, hashed.digests)
        except DatabaseUnreachable as error:
            log.warning("%s; the files will be hashed again", error)
