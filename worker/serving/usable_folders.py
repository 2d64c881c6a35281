"""Checks that a worker can do its work here, before it imports what takes a while."""

from __future__ import annotations

import logging
import os

from qbatch.core.errors import StorageUnavailable, UsageError
from qbatch.core.filesystem import probe, require_locks, why_unusable
from qbatch.core.settings import Settings

log = logging.getLogger("qbatch.worker")


def check_environment(settings: Settings) -> None:
    """Check that this worker can do its work here.

    Raises UsageError for SQLite with a broker on another machine, and StorageUnavailable if a folder is not writable
    or its file system lacks an operation that is needed.
    """
    if not settings.is_one_machine and settings.sqlalchemy_url.startswith("sqlite"):
        raise UsageError("the broker is on another machine, and SQLite works on one only: set QBATCH_DATABASE_URL")
    try:
        for folder in (settings.home, settings.checkpoints, settings.staging, settings.logs):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise StorageUnavailable(f"{folder} is not writable")
    except OSError as error:
        raise StorageUnavailable(why_unusable(error)) from error
    for refusal in sorted(probe(settings.staging)):
        log.info("the file system of the storage does not support %s; continuing without it", refusal)
    require_locks(settings.cache, "the cache of sources", "QBATCH_CACHE")
