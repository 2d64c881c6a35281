"""Starts runners. One stands by: forked, and on a GPU with its imports done and CUDA started, while it has no order."""

from __future__ import annotations

import logging
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

from qbatch.core.domain import DeviceKind
from qbatch.core.errors import one_line
from qbatch.worker.runner import entry_points
from qbatch.worker.runner.messages import Order, Ready

log = logging.getLogger("qbatch.worker")

# Pauses before each attempt to start a runner. The pipes of a killed forkserver close a moment before it counts as
# dead, and only then is it replaced.
_FORK_PAUSES_S = (0.0, 0.1, 1.0)
# How long a bundle waits for a runner that is still preparing itself: less than its own imports would take.
_READY_S = 3.0
_END_S = 5.0


class NoRunner(Exception):
    """No runner can be started, because the forkserver died each time."""


class Runners:
    """Starts the runner of each bundle from ``forkserver``. Use it from one thread, and ``close`` it."""

    def __init__(self, forkserver: ForkServerContext, device_kind: DeviceKind) -> None:
        self._forkserver = forkserver
        self._device_kind = device_kind
        self._standby: tuple[BaseProcess, Connection] | None = None

    def stand_by(self) -> None:
        """Start the next runner now, unless one stands by. Call it when nothing is timed and no memory is measured."""
        if self._standby is not None and self._standby[0].is_alive():
            return
        self.close()
        try:
            self._standby = self.fork(entry_points.stand_by, self._device_kind)
        except (EOFError, OSError) as error:
            log.warning("no runner stands by (%s); the next bundle starts one", one_line(error))

    def start(self, order: Order) -> tuple[BaseProcess, Connection]:
        """A runner that has its order: the one that stands by, or a new one. Raises NoRunner."""
        standby = self._take()
        if standby is not None and _gets(order, *standby):
            return standby
        for pause_s in _FORK_PAUSES_S:
            time.sleep(pause_s)
            try:
                started = self.fork(entry_points.work)
            except (EOFError, OSError) as error:
                reason = one_line(error)
                log.warning("the forkserver died (%s)", reason)
                continue
            if _gets(order, *started):
                return started
            reason = "it ended before it received its bundle"
        raise NoRunner(f"no runner can be started: {reason}")

    def close(self) -> None:
        """End the runner that stands by."""
        standby, self._standby = self._standby, None
        if standby is not None:
            _end(*standby)

    def _take(self) -> tuple[BaseProcess, Connection] | None:
        """The runner that stands by, if it is ready. One that is not is given up: its device may not answer."""
        standby, self._standby = self._standby, None
        if standby is None:
            return None
        process, connection = standby
        try:
            if connection.poll(_READY_S) and isinstance(connection.recv(), Ready) and process.is_alive():
                return standby
        except (EOFError, OSError):
            pass  # it has ended, because it had waited too long, or was killed
        _end(process, connection)
        return None

    def fork(self, work: object, *args: object) -> tuple[BaseProcess, Connection]:
        """A process that calls ``work(connection, *args)``, and the other end. Raises EOFError or OSError."""
        ours, theirs = self._forkserver.Pipe()
        with theirs:
            process = self._forkserver.Process(target=work, args=(theirs, *args), daemon=True)  # type: ignore[arg-type]
            try:
                process.start()
            except BaseException:
                # A runner may have started nevertheless. It ends when its pipe closes.
                ours.close()
                raise
        return process, ours


def _gets(order: Order, process: BaseProcess, connection: Connection) -> bool:
    """Send a runner its order. False if it has ended, which costs nobody anything: nothing had begun."""
    try:
        connection.send(order)
    except OSError:
        _end(process, connection)
        return False
    return True


def _end(process: BaseProcess, connection: Connection) -> None:
    if process.is_alive():
        process.kill()
    connection.close()
    process.join(_END_S)
