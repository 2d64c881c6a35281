"""Compare what the database believes with what is: leases that ran out, messages that vanished."""

from __future__ import annotations

import logging
from pathlib import Path

from qbatch.core.domain import format_job_id
from qbatch.core.filesystem import disk_space
from qbatch.core.retry_policy import RetryLimits
from qbatch.core.settings import Settings
from qbatch.models_db import jobs, pauses, window, workers
from qbatch.models_db.database_id import database_id
from qbatch.models_db.session import Database
from qbatch.scheduler.broker import Broker

log = logging.getLogger("qbatch.scheduler")


def expire_leases(database: Database, settings: Settings) -> None:
    """Take jobs back from workers that have been silent for a lease."""
    with database.write() as session:
        lost = jobs.expire(session, backoff_s=settings.backoff_s, max_failures=settings.max_failures)
    for job_id in lost:
        log.warning("%s: its worker was silent for longer than a lease; taken back", format_job_id(job_id))


def mend_times(database: Database, settings: Settings) -> None:
    """Cut short what the database's clock, before it was set back, dated far ahead: within a lease all is as usual."""
    limits = RetryLimits(backoff_s=settings.backoff_s, max_failures=settings.max_failures)
    with database.write() as session:
        # Leases first: by their heartbeats it is told whose they are.
        count = jobs.mend_times(
            session, lease_s=settings.lease_s, backoff_s=settings.backoff_s, max_failures=settings.max_failures
        )
        count += workers.mend_times(session) + pauses.mend_times(session, limits.wait_s(settings.max_failures))
    if count:
        log.warning(
            "%s leases, backoffs, pauses or heartbeats lay further ahead than any that are given: the database's clock"
            " was set back, or is set otherwise; they end in time",
            count,
        )


def give_up_too_large(database: Database, settings: Settings) -> None:
    """Fail what waits for a GPU larger than there are any longer."""
    with database.write() as session:
        failed = jobs.give_up_too_large(session, settings.lease_s)
    for job_id in failed:
        log.warning("%s ran out of memory, and no larger GPU is left", format_job_id(job_id))


def watch_disk_space(database: Database, settings: Settings) -> None:
    """End a pause as soon as the storage has the room that was missing, or nobody waits for it any more; not before.

    Where that cannot be told from here a pause ends by itself, and the job that waits finds out anew.
    """
    with database.read() as session:
        needed = {pause.reason: pause.needed_bytes for pause in pauses.noted(session)}
        is_awaited = bool(needed) and jobs.any_waits_for_space(session)
        # Where workers make checkpoints. A machine with another file system in the storage's place does not have it.
        staging = settings.staging_of(database_id(session))
    for reason, needed_bytes in needed.items():
        missing = _missing_bytes(staging, needed_bytes)
        if not is_awaited or (missing is not None and missing <= 0):
            with database.write() as session:
                pauses.lift(session, reason)
            log.info("the storage has room again, or nobody waits for it: bundles are sent again")
        elif missing is not None:
            with database.write() as session:
                pauses.renew(session, reason, settings.backoff_s)


def _missing_bytes(staging: Path, needed_bytes: int | None) -> int | None:
    """None where nobody knows what is needed, or the storage is not seen from here."""
    try:
        room = disk_space(staging) if needed_bytes is not None else None
    except OSError:
        return None
    return None if room is None or needed_bytes is None else needed_bytes - room.free


def resend_vanished(database: Database, broker: Broker) -> None:
    """Free the bundles whose message two scans in a row did not find, so that ``top_up`` sends them again."""
    with database.read() as session:
        believed = window.standing(session)
    if not believed:
        return
    found = broker.standing(set(believed.values()))
    missing = believed.keys() - found
    with database.write() as session:
        gone = window.note_scan(session, missing=missing, present=believed.keys() & found)
    for dispatch_id in gone:
        log.warning("message %s vanished from Redis; its bundle will be sent again", dispatch_id)
