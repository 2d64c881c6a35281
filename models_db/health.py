"""The part of an installation's health that the database shows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from qbatch.core.domain import OPEN_STATES, DeviceKind
from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.few_jobs import HAS_FAILED
from qbatch.models_db.lacking_devices import lacking_devices
from qbatch.models_db.leases import LEAD, holder
from qbatch.models_db.listing import list_workers
from qbatch.models_db.pauses import in_force
from qbatch.models_db.tables import Job, Lease, Worker
from qbatch.models_db.time_left import open_batches

_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseNote:
    """Why nothing is dispatched, and since when."""

    reason: str
    message: str
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The health of an installation.

    ``leader`` is the scheduler that leads now. ``ahead_s`` is how far stored times are in the future, because the
    database's clock was set back; None if none are. ``workers`` is the result of ``list_workers``. ``failed`` counts
    the jobs that failed within the last day by error kind, ``open_jobs`` the queued and running ones by state.
    ``lacking`` is the result of ``lacking_devices`` for the open batches.
    """

    leader: str | None
    ahead_s: float | None
    workers: list[dict[str, Any]]
    open_jobs: dict[str, int]
    failed: dict[str, int]
    pauses: list[PauseNote]
    lacking: dict[int, DeviceKind]


def health(session: Session, lease_s: float, *, lead_s: float | None = None) -> Health:
    """Read the health, by the database's clock. ``lead_s`` is the longest lease of a leader if not ``lease_s``."""
    longest_s = max(lead_s or 0.0, lease_s) + SLACK_S
    states = session.execute(
        select(Job.state, func.count()).where(Job.state.in_(OPEN_STATES)).group_by(Job.state).order_by(Job.state)
    )
    failed = session.execute(
        select(Job.error_kind, func.count())
        .where(HAS_FAILED, Job.finished_at > db_now(-_DAY_S))
        .group_by(Job.error_kind)
        .order_by(func.count().desc(), Job.error_kind)
    )
    return Health(
        leader=holder(session, LEAD, longest_s),
        ahead_s=_ahead_s(session, longest_s),
        workers=list_workers(session, lease_s),
        open_jobs={state: count for state, count in states},
        failed={str(kind): count for kind, count in failed},
        pauses=[PauseNote(reason=p.reason, message=p.message, since=p.since) for p in in_force(session)],
        lacking=lacking_devices(session, open_batches(session), lease_s),
    )


def _ahead_s(session: Session, longest_s: float) -> float | None:
    latest_lease = select(func.max(Lease.expires_at)).scalar_subquery()
    latest_beat = select(func.max(Worker.heartbeat_at)).scalar_subquery()
    now, lease, beat = session.execute(select(db_now(), latest_lease, latest_beat)).one()
    ahead = [(lease - now).total_seconds() - longest_s] if lease is not None else []
    ahead += [(beat - now).total_seconds() - SLACK_S] if beat is not None else []
    return max((s for s in ahead if s > 0), default=None)
