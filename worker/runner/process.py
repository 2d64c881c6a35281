"""The runner: a process that uses the GPU for one bundle."""

from __future__ import annotations

import gc
import logging
import os
import platform
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from qbatch.core.domain import DeviceKind
from qbatch.scheduler.child_process import ORPHANED
from qbatch.worker.machine.logs import escape_control_characters, log_to_stderr
from qbatch.worker.runner.bundle import Bundle
from qbatch.worker.runner.job_log_writer import JobLogWriter
from qbatch.worker.runner.messages import (
    Answered,
    Ended,
    Failed,
    FetchingAhead,
    Measured,
    Order,
    Pulse,
    Question,
    Ready,
    Reply,
    RunnerMessage,
)
from qbatch.worker.runner.timing_pauses import TimingPauses

if TYPE_CHECKING:
    from qbatch.worker.measuring.why.kernels_server import KernelsServer

log = logging.getLogger("qbatch.runner")

# A runner that stands by on a GPU holds half a gigabyte of it, which others may need while nothing is to be done.
_STANDS_BY_ON_GPU_S = 60.0


class SupervisorLink:
    """The runner's end of the pipe. A separate thread reads it, to notice at any time if the supervisor is silent."""

    def __init__(self, connection: Connection, lease_s: float, pauses: TimingPauses, logs: JobLogWriter) -> None:
        self._connection = connection
        self._lease_s = lease_s
        self._pauses = pauses
        self._logs = logs
        # Progress is reported from several threads.
        self._sending = threading.Lock()
        self._replies = SimpleQueue[Reply]()
        self._ended = False
        self._listener = threading.Thread(target=self._listen, daemon=True, name="link")
        self._listener.start()

    def send(self, message: RunnerMessage) -> None:
        with self._sending:
            self._connection.send(message)
        if isinstance(message, Measured | Failed):
            self._logs.end([message.job_id])

    def end(self) -> None:
        """Send the last message, and wait until the supervisor closes the pipe.

        If the runner closed it first, the supervisor's next message would fail, and it might not read ours.
        """
        self._ended = True
        self.send(Ended())
        self._listener.join(self._lease_s)

    def ask(self, question: Question) -> Reply:
        """Ask the supervisor and wait for its reply. Only one question may be open at a time."""
        self.send(question)
        reply = self._replies.get()
        if isinstance(reply, Answered):
            self._logs.end(reply.job_ids)
        return reply

    def _listen(self) -> None:
        while True:
            try:
                # A worker that was silent for so long has lost its lease, so its runner must release the GPU.
                if not self._connection.poll(self._lease_s):
                    _leave("the worker has not sent anything for the length of a lease")
                message = self._connection.recv()
            except (EOFError, OSError):
                if self._ended:
                    return
                _leave("the worker has ended")
            if isinstance(message, Reply):
                self._replies.put(message)
            elif isinstance(message, FetchingAhead):
                self._pauses.pause_while_timing(message.pid)
            elif not isinstance(message, Pulse):
                _leave(f"the worker sent an unknown message, {message!r}")


def _leave(reason: str) -> None:
    # Exit at once: there is nobody to report to, and the main thread may be blocked in a kernel.
    print(f"runner: {reason}; exiting", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(ORPHANED)


def run(connection: Connection, kernels: KernelsServer | None = None) -> None:
    """A runner's whole life. The first message in ``connection`` is its ``Order``, and everything that it has to say
    goes through it; its output goes into the log. ``kernels``: the process that it has forked, if it has."""
    # What the forkserver imported stays: collecting garbage need not look through it, nor copy its pages by that.
    gc.freeze()
    try:
        order = connection.recv()
    except (EOFError, OSError):
        os._exit(ORPHANED)
    if kernels is None and order.device_kind is DeviceKind.CUDA:
        kernels = _fork_kernels_server()
    _work(order, connection, kernels)


def stand_by(connection: Connection, device_kind: DeviceKind) -> None:
    """Prepare for any order, say so, and wait for one. Exits if none comes."""
    kernels = None
    if device_kind is DeviceKind.CUDA:
        kernels = _fork_kernels_server()
        _start_cuda()
    connection.send(Ready())
    # Without an end on a CPU, where a fork costs nothing while it waits. It ends with its worker.
    if not connection.poll(_STANDS_BY_ON_GPU_S if device_kind is DeviceKind.CUDA else None):
        os._exit(0)
    run(connection, kernels)


def _fork_kernels_server() -> KernelsServer:
    """Now, while this process has a single thread and has not used the GPU: no fork of it could use that later."""
    from qbatch.worker.measuring.why.kernels_server import fork_server

    return fork_server()


def _start_cuda() -> None:
    """Do what would keep the next bundle waiting: import bitsandbytes, and start CUDA on the device.

    If that fails, the process ends and the next bundle's own runner meets it again, so that its jobs can say so.
    """
    import torch

    from qbatch.worker.methods.implementations import import_usual_library

    import_usual_library()
    torch.cuda.synchronize()


def _work(order: Order, connection: Connection, kernels: KernelsServer | None) -> None:
    _redirect_output(order.log_path)
    escape_control_characters(sys.stdout)
    log_to_stderr()
    logs = JobLogWriter(order.log_path.parent, order.claims)
    logging.getLogger("qbatch").addHandler(logs)
    pauses = TimingPauses()
    link = SupervisorLink(connection, order.lease_s, pauses, logs)
    _introduce(order)
    Bundle(order, link, pauses, kernels).run()
    link.end()
    # Skip the interpreter's shutdown: that of CUDA can hang, and everything has been sent and synced.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _introduce(order: Order) -> None:
    """Write the first line of each job's log. If the runner is killed, this line says where else to look."""
    others = len(order.claims) - 1
    company = f" with {others} other job{'s' * (others > 1)} of its model" if others else ""
    for claim in order.claims:
        log.info(
            "j%s: attempt %s, on %s of %s%s; what other libraries print is in %s",
            claim.job_id,
            claim.attempt,
            order.device_name,
            platform.node(),
            company,
            order.log_path.name,
        )


def _redirect_output(log_path: Path) -> None:
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        # Go on, so that the work itself reports a full storage. The output goes to the worker's log meanwhile.
        print(f"runner: cannot open the log {log_path}: {error.strerror}", file=sys.stderr, flush=True)  # noqa: T201
        return
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
