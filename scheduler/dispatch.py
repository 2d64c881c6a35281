"""Keep a window of bundles in Redis."""

from __future__ import annotations

from collections import Counter

from models_db import window, workers
from models_db.domain import DeviceKind
from models_db.errors import BrokerUnreachable
from models_db.session import Database
from models_db.settings import Settings
from scheduler.broker import Broker
from scheduler.queues import queue_of


def top_up(database: Database, broker: Broker, settings: Settings) -> int:
    """Fill each live kind's queue to ``window`` bundles a worker; how many bundles were sent.

    Rows first, messages second: what dies in between leaves rows that the next scans find without a message.
    Raises BrokerUnreachable after taking back what could not be sent.
    """
    with database.write() as session:
        kinds = Counter(DeviceKind(worker.device_kind) for worker in workers.live(session, settings.lease_s))
        chosen = [
            dispatch
            # A job that may run anywhere goes to a GPU where there is one.
            for kind in sorted(kinds, key=lambda kind: kind is not DeviceKind.CUDA)
            for dispatch in window.choose(session, kind=kind, queue=queue_of(kind), slots=settings.window * kinds[kind])
        ]
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
