"""Compare what the database believes with what is: leases that ran out, messages that vanished."""

from __future__ import annotations

import logging

from models_db import jobs, window
from models_db.domain import DeviceKind, format_job_id
from models_db.session import Database
from models_db.settings import Settings
from scheduler.broker import Broker
from scheduler.queues import queue_of

log = logging.getLogger("qbatch.scheduler")

_QUEUES = (queue_of(DeviceKind.CUDA), queue_of(DeviceKind.CPU))


def expire_leases(database: Database, settings: Settings) -> None:
    """Take jobs back from workers that have been silent for a lease."""
    with database.write() as session:
        lost = jobs.expire(session, backoff_s=settings.backoff_s, max_failures=settings.max_failures)
    for job_id in lost:
        log.warning("%s: its worker was silent for longer than a lease; taken back", format_job_id(job_id))


def resend_vanished(database: Database, broker: Broker) -> None:
    """Free the bundles whose message two scans in a row did not find, so that ``top_up`` sends them again."""
    with database.read() as session:
        believed = window.standing(session)
    if not believed:
        return
    found = broker.standing(_QUEUES)
    missing = believed.keys() - found
    with database.write() as session:
        gone = window.note_scan(session, missing=missing, present=believed.keys() & found)
    for dispatch_id in gone:
        log.warning("message %s vanished from Redis; its bundle will be sent again", dispatch_id)
