"""Correct the database where it no longer matches reality: expired leases, vanished messages, times in the future."""

from __future__ import annotations

import logging
from pathlib import Path

from qbatch.core.domain import format_batch_id, format_job_id
from qbatch.core.filesystem import disk_space
from qbatch.core.settings import Settings
from qbatch.models_db import arrivals, jobs, pauses, window, workers
from qbatch.models_db.database_id import database_id
from qbatch.models_db.session import Database
from qbatch.scheduler.broker import Broker

log = logging.getLogger("qbatch.scheduler")


def expire_leases(database: Database, settings: Settings) -> None:
    """Take jobs back from workers that have not renewed their lease in time."""
    with database.write() as session:
        lost = jobs.expire(session, limits=settings.retry_limits)
    for job_id in lost:
        log.warning("%s was taken back: its worker did not renew the lease in time", format_job_id(job_id))


def remove_abandoned_batches(database: Database, settings: Settings) -> None:
    """Remove what a submit has left that was silent for a lease before its batch was whole: a part at each call."""
    for batch_id in arrivals.remove_silent(database, settings.lease_s):
        log.warning("%s was removed: its submit ended before all of it was stored", format_batch_id(batch_id))


def shorten_future_times(database: Database, settings: Settings) -> None:
    """Shorten leases, backoffs, pauses and heartbeats that lie too far in the future.

    They were recorded before the database's clock was set back. Everything is normal again within one lease.
    """
    limits = settings.retry_limits
    with database.write() as session:
        # Leases first, because the heartbeats tell which workers they belong to.
        count = jobs.shorten_future_times(session, lease_s=settings.lease_s, limits=limits)
        longest_pause_s = max(limits.wait_s(limits.max_failures), _renewed_pause_s(settings))
        count += workers.shorten_future_times(session) + arrivals.shorten_future_times(session)
        count += pauses.shorten_future_times(session, longest_pause_s)
    if count:
        log.warning(
            "%s leases, backoffs, pauses or heartbeats were too far in the future, and were shortened: the database's"
            " clock was set back, or other schedulers or workers have other settings",
            count,
        )


def fail_jobs_without_gpu(database: Database, settings: Settings) -> None:
    """Fail jobs that wait for a larger GPU than any worker still has."""
    with database.write() as session:
        failed = jobs.give_up_too_large(session, settings.lease_s)
    for job_id in failed:
        log.warning("%s failed: it ran out of GPU memory, and no larger GPU is left", format_job_id(job_id))


def watch_disk_space(database: Database, settings: Settings) -> None:
    """End a pause as soon as the storage has the missing space, or no job waits for it.

    If the storage is not visible from here, the pause expires by itself, and the waiting job tries again.
    """
    with database.read() as session:
        needed = {pause.reason: pause.needed_bytes for pause in pauses.on_record(session)}
        is_awaited = bool(needed) and jobs.any_waits_for_space(session)
        # The folder in which workers write checkpoints. It is missing on a machine that has not mounted the storage.
        staging = settings.staging_of(database_id(session))
    for reason, needed_bytes in needed.items():
        missing = _missing_bytes(staging, needed_bytes)
        if not is_awaited or (missing is not None and missing <= 0):
            with database.write() as session:
                pauses.lift(session, reason)
            log.info("the storage has enough space again, or no job waits for it: sending jobs again")
        elif missing is not None:
            with database.write() as session:
                pauses.renew(session, reason, _renewed_pause_s(settings))


def _renewed_pause_s(settings: Settings) -> float:
    """How long a renewed pause lasts. It must outlast a slow tick, and the time until another scheduler leads."""
    return max(settings.backoff_s, settings.lead_s)


def _missing_bytes(staging: Path, needed_bytes: int | None) -> int | None:
    """How many bytes are missing; None if the need is unknown or the storage is not visible from here."""
    try:
        space = disk_space(staging) if needed_bytes is not None else None
    except OSError:
        return None
    return None if space is None or needed_bytes is None else needed_bytes - space.free


def resend_vanished(database: Database, broker: Broker) -> None:
    """Release bundles whose message was missing in two scans in a row, so that ``top_up`` sends them again."""
    with database.read() as session:
        expected = window.waiting_messages(session)
    if not expected:
        return
    present = broker.message_ids(set(expected.values()))
    missing = expected.keys() - present
    with database.write() as session:
        vanished = window.record_scan(session, missing=missing, present=expected.keys() & present)
    for dispatch_id in vanished:
        log.warning("message %s vanished from Redis; its bundle will be sent again", dispatch_id)
