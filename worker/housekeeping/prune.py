"""``qbatch prune``: remove old batches with their files on the storage, except checkpoints, and old file checksums."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from qbatch.core.settings import Settings
from qbatch.models_db import file_digests, searches, skip_list_keys
from qbatch.models_db.database_id import database_id
from qbatch.models_db.retention import Prunable, delete_empty, delete_jobs, find_prunable, needed_since
from qbatch.models_db.session import Database
from qbatch.models_db.write_lock import pausing_afterwards
from qbatch.worker.housekeeping.stale_files import (
    Pruned,
    base_outputs,
    chunks,
    old_logs,
    rejected_checkpoints,
    remove_each,
)


def prune(database: Database, settings: Settings, older_than_s: float, *, dry_run: bool = False) -> list[Pruned]:
    """Remove what is older than ``older_than_s`` seconds, or report what would be removed.

    Checkpoints and their rows are kept. It is safe while workers run, and may be interrupted and run again. Raises
    DatabaseUnreachable; files that cannot be removed are listed in ``problems``.
    """
    with database.read() as session:
        prunable = find_prunable(session, older_than_s)
        needed_s = needed_since(session, older_than_s).timestamp()
        places = file_digests.hashed_before(session, older_than_s)
        own = database_id(session)
    batches, jobs = len(prunable.batch_ids), len(prunable.job_ids)
    if not dry_run:
        batches, jobs = _delete(database, prunable, older_than_s)
    before_s = time.time() - older_than_s
    gone = frozenset(prunable.job_ids) if dry_run else frozenset[int]()
    logs = old_logs(database, settings.logs_of(own), before_s, gone)
    return [
        Pruned(what="batches", number=batches),
        Pruned(what="jobs", number=jobs),
        remove_each("logs", logs, Path.unlink, settings.storage, dry_run=dry_run),
        rejected_checkpoints(settings, before_s, own, dry_run=dry_run),
        base_outputs(settings, needed_s, dry_run=dry_run),
        Pruned(what="file digests", number=len(places) if dry_run else _forget(database, places, older_than_s)),
    ]


def _delete(database: Database, prunable: Prunable, older_than_s: float) -> tuple[int, int]:
    """Delete rows. Returns how many batches and jobs were deleted."""
    jobs = batches = 0
    for job_ids in chunks(prunable.job_ids):
        with pausing_afterwards(), database.write() as session:
            jobs += delete_jobs(session, job_ids, older_than_s)
    for batch_ids in chunks(prunable.batch_ids):
        with pausing_afterwards(), database.write() as session:
            batches += delete_empty(session, batch_ids)
    return batches, jobs


def _forget(database: Database, places: Sequence[str], older_than_s: float) -> int:
    """Delete checksums, what skip lists mean, and what searches found that no job refers to any more.

    Returns how many files will be hashed again when they are used.
    """
    forgotten = 0
    for chunk in chunks(places):
        with pausing_afterwards(), database.write() as session:
            forgotten += file_digests.forget(session, chunk, older_than_s)
    with database.write() as session:
        skip_list_keys.forget(session, older_than_s)
        searches.forget_unused(session, older_than_s)
    return forgotten
