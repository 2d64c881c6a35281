"""The supervisor's end of the pipe to a runner, which shows the runner that its worker is alive."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection

from qbatch.worker.runner.messages import FetchingAhead, Pulse, Reply

_PULSE_S = 1.0


class PulsingPipe:
    """A pipe on which a separate thread sends a pulse every second, even while the database blocks the supervisor."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse")
        self._thread.start()

    def send(self, message: Reply | FetchingAhead | Pulse) -> bool:
        """Send a message. False if the runner no longer reads; its last messages may still be unread here."""
        try:
            with self._lock:
                self.connection.send(message)
        except OSError:
            return False
        return True

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(_PULSE_S) and self.send(Pulse()):
            pass
