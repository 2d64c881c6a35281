"""Keep a window of bundles in Redis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind
from qbatch.core.errors import BrokerUnreachable
from qbatch.core.settings import Settings
from qbatch.models_db import pauses, window, workers
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Worker
from qbatch.models_db.vram import floor_bytes, vram_class
from qbatch.models_db.window import Dispatch, QueueRange
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.queues import queue_of, queues_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveQueue:
    """A queue, how many workers read it now, and what belongs into it."""

    kind: DeviceKind
    queue: str
    readers: int
    needs: QueueRange


def live_queues(around: Sequence[tuple[Worker, bool]]) -> list[LiveQueue]:
    """The queues of these workers (each with whether it takes jobs now), the largest VRAM class first, the CPU's last:
    a job that may run anywhere goes to a GPU where there is one.
    """
    gpus = [(vram_class(worker.memory_bytes), ready) for worker, ready in around if _is(worker, DeviceKind.CUDA)]
    cpus = [ready for worker, ready in around if _is(worker, DeviceKind.CPU)]
    sizes = sorted({size for size, _ in gpus}, reverse=True)
    found = [
        LiveQueue(
            kind=DeviceKind.CUDA,
            queue=queue_of(DeviceKind.CUDA, size),
            # Larger GPUs read the queues of smaller ones too.
            readers=sum(ready for other, ready in gpus if other >= size),
            needs=QueueRange(
                over=max((floor_bytes(other) for other in sizes if other < size), default=None),
                under=floor_bytes(size) if size < sizes[0] else None,
                largest=floor_bytes(sizes[0]),
            ),
        )
        for size in sizes
    ]
    if cpus:
        # What ran out of a GPU's memory is not for a CPU.
        needs = QueueRange(largest=0)
        found.append(LiveQueue(kind=DeviceKind.CPU, queue=queue_of(DeviceKind.CPU), readers=sum(cpus), needs=needs))
    return found


def _read_by(worker: Worker) -> list[str]:
    return queues_of(DeviceKind(worker.device_kind), worker.memory_bytes)


def _is(worker: Worker, kind: DeviceKind) -> bool:
    return worker.device_kind == kind


def top_up(database: Database, broker: Broker, settings: Settings) -> int:
    """Fill the queue of each VRAM class, and the CPUs', to ``window`` bundles a live worker; how many were sent.

    Rows first, messages second: what dies in between leaves rows that the next scans find without a message.
    Raises BrokerUnreachable after taking back what could not be sent.
    """
    with database.write() as session:
        chosen = _choose(session, settings)
    if not chosen:
        return 0
    try:
        broker.send(chosen)
    except BrokerUnreachable:
        # A message that did get out before the break is then a second copy, which changes nothing.
        with database.write() as session:
            window.take_out(session, [dispatch.dispatch_id for dispatch in chosen])
        raise
    return len(chosen)


def _choose(session: Session, settings: Settings) -> list[Dispatch]:
    if pauses.standing(session):
        return []
    around = workers.around(session, settings.lease_s)
    if around:
        window.recall(session, {queue for worker, _ in around for queue in _read_by(worker)})
    return [
        dispatch
        for live_queue in live_queues(around)
        if live_queue.readers
        for dispatch in window.choose(
            session,
            kind=live_queue.kind,
            queue=live_queue.queue,
            slots=settings.window * live_queue.readers,
            needs=live_queue.needs,
        )
    ]
