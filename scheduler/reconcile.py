"""Compare what the database believes with what is: leases that ran out, messages that vanished."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from models_db import jobs, pauses, window
from models_db.domain import format_job_id
from models_db.session import Database
from models_db.settings import Settings
from scheduler.broker import Broker

log = logging.getLogger("qbatch.scheduler")


def expire_leases(database: Database, settings: Settings) -> None:
    """Take jobs back from workers that have been silent for a lease."""
    with database.write() as session:
        lost = jobs.expire(session, backoff_s=settings.backoff_s, max_failures=settings.max_failures)
    for job_id in lost:
        log.warning("%s: its worker was silent for longer than a lease; taken back", format_job_id(job_id))


def give_up_too_large(database: Database, settings: Settings) -> None:
    """Fail what waits for a GPU larger than there are any longer."""
    with database.write() as session:
        failed = jobs.give_up_too_large(session, settings.lease_s)
    for job_id in failed:
        log.warning("%s ran out of memory, and no larger GPU is left", format_job_id(job_id))


def lift_pauses(database: Database, settings: Settings) -> None:
    """Have bundles sent again as soon as the storage, where this machine sees it, has the room that was missing."""
    with database.read() as session:
        waiting = [(pause.reason, pause.needed_bytes) for pause in pauses.standing(session)]
    free = _free_bytes(settings.storage) if waiting else None
    for reason, needed_bytes in waiting:
        if free is None or needed_bytes is None or free < needed_bytes:
            continue
        with database.write() as session:
            pauses.lift(session, reason)
        log.info("the storage has room again: bundles are sent again")


def _free_bytes(storage: Path) -> int | None:
    """None where the storage is not to be seen from here."""
    try:
        found = os.statvfs(storage)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


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
