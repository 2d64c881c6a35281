"""Keep a limited number of bundles in Redis; the rest of the queue is in the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind
from qbatch.core.errors import BrokerUnreachable
from qbatch.core.settings import Settings
from qbatch.core.vram_classes import floor_bytes, vram_class
from qbatch.models_db import pauses, window, workers
from qbatch.models_db.backlog_looks import BacklogLooks
from qbatch.models_db.ready_bundles import QueueRange
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Worker
from qbatch.models_db.window import Dispatch
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.queues import queue_of, queues_of

_AT_ONCE = 50
"""The most bundles that one transaction marks. Others who write wait for its end; a fleet's start has 800 to mark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveQueue:
    """A queue, how many workers read it now, and which jobs belong in it."""

    kind: DeviceKind
    queue: str
    readers: int
    needs: QueueRange


def live_queues(present: Sequence[tuple[Worker, bool]]) -> list[LiveQueue]:
    """The queues of these workers, each given with whether it takes jobs now.

    The largest VRAM class comes first and the CPU queue last, so a job that may run anywhere prefers a GPU.
    """
    gpus = [(vram_class(worker.memory_bytes), ready) for worker, ready in present if _is(worker, DeviceKind.CUDA)]
    cpus = [ready for worker, ready in present if _is(worker, DeviceKind.CPU)]
    sizes = sorted({size for size, _ in gpus}, reverse=True)
    queues = [
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
        # A job that ran out of GPU memory is not sent to a CPU.
        needs = QueueRange(largest=0)
        queues.append(LiveQueue(kind=DeviceKind.CPU, queue=queue_of(DeviceKind.CPU), readers=sum(cpus), needs=needs))
    return queues


def _read_by(worker: Worker) -> list[str]:
    return queues_of(DeviceKind(worker.device_kind), worker.memory_bytes)


def _is(worker: Worker, kind: DeviceKind) -> bool:
    return worker.device_kind == kind


def top_up(database: Database, broker: Broker, settings: Settings, looks: BacklogLooks | None = None) -> int:
    """Fill the queue of each VRAM class, and of the CPUs, to ``window`` bundles per live worker.

    Returns how many bundles were sent. Their rows are marked before the messages are sent: if this process dies in
    between, the next scans find rows without a message. ``looks`` are those of the earlier calls of a process that
    calls this often. Raises BrokerUnreachable, after undoing the marks of those that were not sent.
    """
    looks = BacklogLooks() if looks is None else looks
    sent = 0
    while True:
        with database.write() as session:
            chosen = _choose(session, settings, looks)
        if chosen:
            _send(database, broker, chosen)
            sent += len(chosen)
        if looks.is_wanted:
            with database.read() as session:
                looks.look(session)
            continue
        looks.end_round()
        if len(chosen) < _AT_ONCE:
            return sent


def _send(database: Database, broker: Broker, chosen: Sequence[Dispatch]) -> None:
    try:
        broker.send(chosen)
    except BrokerUnreachable:
        # Some messages may have been sent before the failure. They become duplicates, which are harmless.
        with database.write() as session:
            window.take_out(session, [dispatch.dispatch_id for dispatch in chosen])
        raise


def _choose(session: Session, settings: Settings, looks: BacklogLooks) -> list[Dispatch]:
    """Mark the next bundles to send, ``_AT_ONCE`` at most. If a look is wanted, the queues after that one wait for it:
    what may run anywhere prefers a GPU."""
    if pauses.in_force(session) or not window.is_only_chooser(session):
        return []
    present = workers.around(session, settings.lease_s)
    if present:
        window.recall(session, {queue for worker, _ in present for queue in _read_by(worker)})
    chosen: list[Dispatch] = []
    for live_queue in live_queues(present):
        if live_queue.readers and len(chosen) < _AT_ONCE and not looks.is_wanted:
            chosen += window.choose(
                session,
                kind=live_queue.kind,
                queue=live_queue.queue,
                slots=settings.window * live_queue.readers,
                needs=live_queue.needs,
                most=_AT_ONCE - len(chosen),
                looks=looks,
            )
    return chosen
