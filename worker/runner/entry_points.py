"""What a forked process calls first, for the worker to name. Each imports what it needs only when it is called: by then
the forkserver has imported it, and the worker never needs to import torch, which takes seconds and 200 MB."""

from __future__ import annotations

from multiprocessing.connection import Connection

from qbatch.core.domain import DeviceKind
from qbatch.worker.runner.messages import FetchOrder


def work(connection: Connection) -> None:
    """A runner's life: see ``process.run``."""
    from qbatch.worker.runner.process import run

    run(connection)


def stand_by(connection: Connection, device_kind: DeviceKind) -> None:
    """The life of a runner that has no order yet: see ``process.stand_by``."""
    from qbatch.worker.runner.process import stand_by

    stand_by(connection, device_kind)


def fetch_ahead(connection: Connection, order: FetchOrder) -> None:
    """See ``fetch_ahead.run``."""
    from qbatch.worker.runner.fetch_ahead import run

    run(connection, order)
