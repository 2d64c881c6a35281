"""The scheduler: one leads, the others stand by."""

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
from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.network_share import share_of
from qbatch.models_db.schema_fit import explain
from qbatch.models_db.session import Database
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.dispatch import top_up
from qbatch.scheduler.reconcile import expire_leases, give_up_too_large, mend_times, resend_vanished, watch_disk_space
from qbatch.scheduler.stop import Stop

log = logging.getLogger("qbatch.scheduler")

_TICK_S = 1.0


class Scheduler:
    """Tops the window up every second and reconciles every ``scan_s``, while it leads."""

    def __init__(self, database: Database, broker: Broker, settings: Settings) -> None:
        self._database = database
        self._broker = broker
        self._settings = settings
        # Containers that share the host's network have its name, and all of them are process 1.
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._tick_s = min(_TICK_S, settings.scan_s)
        self._share = share_of(database.file)
        self._leads = False
        self._cut_from: str | None = None
        self._last_scan: float | None = None
        self._mended_at: float | None = None
        self._last_contact: datetime | None = None
        self._quiet_until = 0.0

    def run(self, stop: Stop) -> None:
        """Until ``stop`` is set. A service that does not answer is waited for. Raises WrongDatabase."""
        try:
            while not stop.is_set():
                try:
                    self.tick()
                except WrongDatabase:
                    raise
                except DatabaseRefused as error:
                    self._see_into(error)
                except (BrokerUnreachable, DatabaseUnreachable) as error:
                    log.warning("%s; trying again", error)
                stop.wait(self._tick_s)
        finally:
            if self._leads:
                self._give_up_the_lead()

    def _see_into(self, refusal: DatabaseRefused) -> None:
        """Raises WrongDatabase where the schema is at fault. A defect of ours may concern one job, and is no reason to
        leave all others."""
        found = explain(self._database, refusal)
        if isinstance(found, WrongDatabase):
            raise found from refusal
        log.error("%s; trying again", found, exc_info=refusal)

    def _give_up_the_lead(self) -> None:
        try:
            with self._database.write() as session:
                leases.release(session, leases.LEAD, self._holder)
        except DatabaseUnreachable as error:
            log.warning("%s; the lead runs out by itself", error)

    def tick(self) -> None:
        """One round. Raises BrokerUnreachable or DatabaseUnreachable."""
        leads = self._lead()
        now = time.monotonic()
        # Also while another's lead has to run out: what it would wait for runs out meanwhile.
        if self._mended_at is None or now - self._mended_at >= self._settings.scan_s:
            self._mended_at = now
            if self._share is not None:
                self._share.hold(self._settings.lease_s)
            mend_times(self._database, self._settings)
        if not leads:
            return
        if self._last_scan is None or now - self._last_scan >= self._settings.scan_s:
            self._last_scan = now
            self._scan(now)
        watch_disk_space(self._database, self._settings)
        top_up(self._database, self._broker, self._settings)

    def _lead(self) -> bool:
        with self._database.write() as session:
            self._database.require_own(session)
            cut_from = leases.cut(session, leases.LEAD, self._settings.lead_s)
            leads = leases.acquire(session, leases.LEAD, self._holder, self._settings.lead_s)
            now = session.execute(select(db_now())).scalar_one()
        if cut_from is not None and cut_from != self._cut_from:
            log.warning(
                "the lead of %s was to end later than any that is given: the database's clock was set back, or its"
                " QBATCH_SCAN_S is larger; it ends within %g s unless it is renewed",
                cut_from,
                self._settings.lead_s,
            )
            self._cut_from = cut_from
        if leads and not self._leads:
            log.info("leading")
            self._last_contact = None
        if leads:
            self._note_contact(now)
        self._leads = leads
        return leads

    def _note_contact(self, now: datetime) -> None:
        """After an outage (or before its first look) a leader cannot tell a dead worker from one that could not renew
        its lease: it gives everyone one full lease to do so.

        By the database's clock, which also shows that this machine slept, or that the clock was set.
        """
        gap_s = (now - self._last_contact).total_seconds() if self._last_contact is not None else None
        if gap_s is not None and gap_s < -SLACK_S:
            log.warning("the database's clock was set back by %g s; leases are ended again after one of them", -gap_s)
            self._mended_at = None
        if gap_s is None or not -SLACK_S <= gap_s <= self._longest_gap_s():
            self._quiet_until = time.monotonic() + self._settings.lease_s
        self._last_contact = now

    def _longest_gap_s(self) -> float:
        """Between two looks. A longer one may have cost a worker that renews in time its lease."""
        settings = self._settings
        spare_s = settings.lease_s - 2 * settings.heartbeat_s
        return max(min(spare_s, 2 * settings.scan_s), 2 * self._tick_s)

    def _scan(self, now: float) -> None:
        if now >= self._quiet_until:
            expire_leases(self._database, self._settings)
            give_up_too_large(self._database, self._settings)
        resend_vanished(self._database, self._broker)
