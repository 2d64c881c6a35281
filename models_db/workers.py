"""The workers: one row for each Celery worker, whose heartbeat shows that it is alive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from qbatch.core.device_load import DeviceLoad
from qbatch.core.domain import DeviceKind, WorkerState
from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """The description of a worker. ``memory_bytes`` is the memory of its GPU, or of the host for a CPU worker."""

    name: str
    host: str
    pid: int
    pid_space: str
    device_kind: DeviceKind
    device_name: str
    device_uuid: str | None
    memory_bytes: int


def register(session: Session, info: WorkerInfo) -> int:
    """Add a worker and return its id."""
    worker = Worker(
        name=info.name,
        host=info.host,
        pid=info.pid,
        pid_space=info.pid_space,
        device_kind=info.device_kind,
        device_name=info.device_name,
        device_uuid=info.device_uuid,
        memory_bytes=info.memory_bytes,
    )
    session.add(worker)
    session.flush()
    return worker.id


def beat(session: Session, worker_id: int, load: DeviceLoad | None = None) -> None:
    """Renew a worker's heartbeat, and with it what is known of its device's load."""
    values: dict[str, Any] = {} if load is None else {"used_bytes": load.used_bytes, "busy_share": load.busy_share}
    session.execute(
        update(Worker).where(Worker.id == worker_id).values(heartbeat_at=db_now(), **values), execution_options=NO_SYNC
    )


def state_of(session: Session, worker_id: int) -> str:
    """A worker's state, which others may change."""
    return session.execute(select(Worker.state).where(Worker.id == worker_id)).scalar_one()


def shorten_future_times(session: Session) -> int:
    """Set heartbeats that are in the future to now, and return how many there were.

    They come from before the database's clock was set back. Without this, dead workers would count as alive.
    """
    ahead = Worker.heartbeat_at > db_now(SLACK_S)
    changed = session.execute(
        update(Worker).where(ahead).values(heartbeat_at=db_now()).returning(Worker.id), execution_options=NO_SYNC
    )
    return len(changed.all())


def leave(session: Session, worker_id: int, state: WorkerState, note: str | None = None) -> None:
    """Mark a worker ``draining`` or ``stopped``, and why; a quarantine stays on record."""
    session.execute(
        update(Worker)
        .where(Worker.id == worker_id, Worker.state != WorkerState.QUARANTINED)
        .values(state=state, note=note),
        execution_options=NO_SYNC,
    )


def is_live(lease_s: float) -> ColumnElement[bool]:
    """A worker that takes jobs: ready, and heard of within a lease."""
    return (Worker.state == WorkerState.READY) & (Worker.heartbeat_at > db_now(-lease_s))


def dead_here(session: Session, info: WorkerInfo, pid_exists: Callable[[int], bool]) -> list[Worker]:
    """The recorded workers from the pid namespace of ``info`` whose processes no longer exist."""
    candidates = session.scalars(
        select(Worker)
        .where(Worker.pid_space == info.pid_space, Worker.state != WorkerState.STOPPED)
        .order_by(Worker.id)
        .with_for_update()
    )
    return [worker for worker in candidates if worker.pid == info.pid or not pid_exists(worker.pid)]


def around(session: Session, lease_s: float) -> list[tuple[Worker, bool]]:
    """The workers, except quarantined ones, with a heartbeat within two leases, each with whether it takes jobs now.

    Two leases, so that jobs that need the device of a restarting worker are kept for it.
    """
    heard = select(Worker, is_live(lease_s)).where(
        Worker.state != WorkerState.QUARANTINED, Worker.heartbeat_at > db_now(-2 * lease_s)
    )
    return [(worker, bool(takes_jobs)) for worker, takes_jobs in session.execute(heard.order_by(Worker.id))]


def live(session: Session, lease_s: float) -> Sequence[Worker]:
    """The workers that take jobs now."""
    return session.scalars(select(Worker).where(is_live(lease_s)).order_by(Worker.id)).all()
