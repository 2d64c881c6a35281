"""Batches that wait although workers are live: for a kind of device that none of them has."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, JobState
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import Batch, Job
from qbatch.models_db.workers import live

# What the first queued job of a batch asks for, as do all others of it.
_ASKED_FOR = (
    select(Job.device)
    .where(Job.batch_id == Batch.id, Job.state == JobState.QUEUED, Job.search_id.is_(None))
    .order_by(Job.id)
    .limit(1)
    .scalar_subquery()
)


def lacking_devices(session: Session, batch_ids: Sequence[int], lease_s: float) -> dict[int, DeviceKind]:
    """The kind of device that the queued jobs of a batch must have and no live worker has, of those of these batches
    of which that is so. Empty while no worker is live."""
    served = {DeviceKind.AUTO, *(worker.device_kind for worker in live(session, lease_s))}
    if len(served) == 1:
        return {}
    asked: dict[int, DeviceKind | None] = {}
    for ids in in_chunks(batch_ids):
        rows = session.execute(select(Batch.id, _ASKED_FOR).where(Batch.id.in_(ids)).order_by(Batch.id))
        asked |= {batch_id: kind for batch_id, kind in rows}
    return {batch_id: DeviceKind(kind) for batch_id, kind in asked.items() if kind is not None and kind not in served}
