"""The scheduler's main loop. Several schedulers may run: one is active (it leads), and the others stand by."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from datetime import datetime

from sqlalchemy import select

from qbatch.core.errors import BrokerUnreachable, DatabaseRefused, DatabaseUnreachable, WrongDatabase
from qbatch.core.settings import Settings
from qbatch.models_db import leases
from qbatch.models_db.backlog_looks import BacklogLooks
from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.gone_checkpoints import note_missing
from qbatch.models_db.network_share import share_of
from qbatch.models_db.query_statistics import refresh_statistics
from qbatch.models_db.schema_fit import explain
from qbatch.models_db.session import Database
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.dispatch import top_up
from qbatch.scheduler.reconcile import (
    expire_leases,
    fail_jobs_without_gpu,
    remove_abandoned_batches,
    resend_vanished,
    shorten_future_times,
    watch_disk_space,
)
from qbatch.scheduler.stop import Stop

log = logging.getLogger("qbatch.scheduler")

_TICK_S = 1.0
_STATISTICS_S = 3600.0


class Scheduler:
    """While it leads, sends bundles every second, and looks for lost leases and messages every ``scan_s``."""

    def __init__(self, database: Database, broker: Broker, settings: Settings) -> None:
        self._database = database
        self._broker = broker
        self._settings = settings
        # Host name and pid are not enough: containers on the host's network share its name, and all are process 1.
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._tick_s = min(_TICK_S, settings.scan_s)
        self._share = share_of(database.file)
        self._leads = False
        self._shortened_lead_of: str | None = None
        self._last_scan: float | None = None
        self._last_time_repair: float | None = None
        self._last_statistics: float | None = None
        self._looks = BacklogLooks()
        self._last_contact: datetime | None = None
        self._quiet_until = 0.0

    def run(self, stop: Stop) -> None:
        """Run until ``stop`` is set, and keep trying while a service does not answer. Raises WrongDatabase."""
        try:
            while not stop.is_set():
                try:
                    self.tick()
                except WrongDatabase:
                    raise
                except DatabaseRefused as error:
                    self._examine(error)
                except (BrokerUnreachable, DatabaseUnreachable) as error:
                    log.warning("%s; trying again", error)
                stop.wait(self._tick_s)
        finally:
            if self._leads:
                self._release_lead()

    def _examine(self, refusal: DatabaseRefused) -> None:
        """Raise WrongDatabase if the schema is at fault. Otherwise log and go on: a defect may affect only one job."""
        cause = explain(self._database, refusal)
        if isinstance(cause, WrongDatabase):
            raise cause from refusal
        log.error("%s; trying again", cause, exc_info=refusal)

    def _release_lead(self) -> None:
        try:
            with self._database.write() as session:
                leases.release(session, leases.LEAD, self._holder)
        except DatabaseUnreachable as error:
            log.warning("%s; the lease on the lead will expire by itself", error)

    def tick(self) -> None:
        """One round. Raises BrokerUnreachable or DatabaseUnreachable."""
        leads = self._lead()
        now = time.monotonic()
        # This also runs while another scheduler leads: if that one is dead, leases must not wait for its lease to end.
        if self._last_time_repair is None or now - self._last_time_repair >= self._settings.scan_s:
            self._last_time_repair = now
            if self._share is not None:
                self._share.hold(self._settings.lease_s)
            shorten_future_times(self._database, self._settings)
        if not leads:
            return
        if self._last_scan is None or now - self._last_scan >= self._settings.scan_s:
            self._last_scan = now
            self._scan(now)
        if self._last_statistics is None or now - self._last_statistics >= _STATISTICS_S:
            self._last_statistics = now
            refresh_statistics(self._database)
            note_missing(self._database, self._settings.storage)
        if now >= self._quiet_until:
            remove_abandoned_batches(self._database, self._settings)
        watch_disk_space(self._database, self._settings)
        top_up(self._database, self._broker, self._settings, self._looks)

    def _lead(self) -> bool:
        with self._database.write() as session:
            self._database.require_own(session)
            shortened = leases.cut(session, leases.LEAD, self._settings.lead_s)
            leads = leases.acquire(session, leases.LEAD, self._holder, self._settings.lead_s)
            now = session.execute(select(db_now())).scalar_one()
        if shortened is not None and shortened != self._shortened_lead_of:
            log.warning(
                "the lease of the leading scheduler %s was longer than this one's settings allow: the database's clock"
                " was set back, or that scheduler has a larger QBATCH_SCAN_S; it is cut to %g s unless it is renewed",
                shortened,
                self._settings.lead_s,
            )
            self._shortened_lead_of = shortened
        if leads and not self._leads:
            log.info("this scheduler now leads")
            self._last_contact = None
        if leads:
            self._note_contact(now)
        self._leads = leads
        return leads

    def _note_contact(self, now: datetime) -> None:
        """Notice an outage, and then expire no leases for the length of one lease.

        After an outage, or at the start, a leader cannot tell a dead worker from one that could not renew its lease.
        ``now`` is the database's time, which also reveals that this machine slept or that the clock was changed.
        """
        gap_s = (now - self._last_contact).total_seconds() if self._last_contact is not None else None
        if gap_s is not None and gap_s < -SLACK_S:
            log.warning("the database's clock was set back by %g s; no job is taken back for one lease", -gap_s)
            self._last_time_repair = None
        if gap_s is None or not -SLACK_S <= gap_s <= self._longest_gap_s():
            self._quiet_until = time.monotonic() + self._settings.lease_s
        self._last_contact = now

    def _longest_gap_s(self) -> float:
        """The longest time between two contacts in which no worker can have lost its lease through an outage."""
        settings = self._settings
        spare_s = settings.lease_s - 2 * settings.heartbeat_s
        return max(min(spare_s, 2 * settings.scan_s), 2 * self._tick_s)

    def _scan(self, now: float) -> None:
        if now >= self._quiet_until:
            expire_leases(self._database, self._settings)
            fail_jobs_without_gpu(self._database, self._settings)
        resend_vanished(self._database, self._broker)
