"""Batches that wait although workers are live: for a kind of device that none of them has."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, JobState
from qbatch.models_db.tables import Job
from qbatch.models_db.workers import live

_MOST_ASKED = 20


def lacking_devices(session: Session, batch_ids: Sequence[int], lease_s: float) -> dict[int, DeviceKind]:
    """The kind of device that the queued jobs of a batch must have and no live worker has, of those of these batches
    of which that is so; of many batches, only the first are looked at. Empty while no worker is live."""
    there = {worker.device_kind for worker in live(session, lease_s)}
    if not there:
        return {}
    asked = ((batch_id, _asked_for(session, batch_id)) for batch_id in batch_ids[:_MOST_ASKED])
    return {batch_id: kind for batch_id, kind in asked if kind not in (DeviceKind.AUTO, *there)}


def _asked_for(session: Session, batch_id: int) -> DeviceKind:
    """What the first queued job of a batch asks for, as do all others of it; AUTO if there is none."""
    queued = (Job.batch_id == batch_id, Job.state == JobState.QUEUED, Job.search_id.is_(None))
    first = session.scalars(select(Job.device).where(*queued).order_by(Job.id).limit(1)).first()
    return DeviceKind(first or DeviceKind.AUTO)
