"""The process that owns the GPU, for one bundle: its pipe, its log, its end."""

from __future__ import annotations

import gc
import os
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from qbatch.worker.machine.logs import keep_from_steering, log_to_stderr
from qbatch.worker.runner.bundle import Bundle
from qbatch.worker.runner.messages import Ended, Order, Pulse, Question, Reply, RunnerMessage

_ORPHANED = 70


class SupervisorLink:
    """The runner's end of the pipe. Its own thread reads, so that a silent supervisor is noticed during any work."""

    def __init__(self, connection: Connection, lease_s: float) -> None:
        self._connection = connection
        self._lease_s = lease_s
        # Progress is told by threads of its own.
        self._sending = threading.Lock()
        self._replies = SimpleQueue[Reply]()
        self._ended = False
        self._listener = threading.Thread(target=self._listen, daemon=True, name="link")
        self._listener.start()

    def send(self, message: RunnerMessage) -> None:
        with self._sending:
            self._connection.send(message)

    def end(self) -> None:
        """Say that there is no more to come, and wait for the supervisor to hang up.

        An end of the pipe that closes earlier fails the supervisor's next word, with ours still unread.
        """
        self._ended = True
        self.send(Ended())
        self._listener.join(self._lease_s)

    def ask(self, question: Question) -> Reply:
        """The supervisor's reply to ``question``; one at a time."""
        self.send(question)
        return self._replies.get()

    def _listen(self) -> None:
        while True:
            try:
                # A worker that is stopped, or gone, has lost its lease by then: its runner must free the GPU.
                if not self._connection.poll(self._lease_s):
                    _leave("the worker has been silent for a lease")
                message = self._connection.recv()
            except (EOFError, OSError):
                if self._ended:
                    return
                _leave("the worker is gone")
            if isinstance(message, Reply):
                self._replies.put(message)
            elif not isinstance(message, Pulse):
                _leave(f"the worker said {message!r}")


def _leave(reason: str) -> None:
    # At once: there is nobody left to report to, and the main thread may sit in a kernel.
    print(f"runner: {reason}; leaving", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(_ORPHANED)


def run(order: Order, connection: Connection) -> None:
    """A runner's whole life. Everything it has to say goes through ``connection``; its output into the log."""
    # What the forkserver imported stays: collecting garbage need not look through it, nor copy its pages by that.
    gc.freeze()
    _redirect_output(order.log_path)
    keep_from_steering(sys.stdout)
    log_to_stderr()
    link = SupervisorLink(connection, order.lease_s)
    Bundle(order, link).run()
    link.end()
    # Not through interpreter shutdown: CUDA's teardown can hang, and everything is said and synced.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _redirect_output(log_path: Path) -> None:
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        # A storage that is full must be said as such, by the work that it stops. What is said meanwhile, the worker's
        # log gets.
        print(f"runner: no log at {log_path}: {error.strerror}", file=sys.stderr, flush=True)  # noqa: T201
        return
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
