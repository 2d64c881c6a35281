"""Being told to stop, by a signal."""

from __future__ import annotations

import queue
import signal


class Stop:
    """What a signal handler sets and others look at or wait for.

    Not threading.Event: a handler that sets one waits for ever where it interrupted this thread's own ``set`` or
    ``wait``, which hold a lock for a moment. A SimpleQueue may be entered again.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._wake.put(None)

    def wait(self, timeout_s: float) -> bool:
        """Return once it is set, or after ``timeout_s``; whether it is."""
        try:
            self._wake.get(timeout=timeout_s)
        except queue.Empty:
            return self._is_set
        self._wake.put(None)  # for whoever else waits
        return True

    def heed_signals(self) -> None:
        """SIGTERM and SIGINT set it from now on. Of the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.set())
