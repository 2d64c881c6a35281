"""A request to stop, set by a signal handler."""

from __future__ import annotations

import queue
import signal


class Stop:
    """A flag that a signal handler sets and that others can check or wait for.

    threading.Event would deadlock: its ``set`` and ``wait`` hold a lock for a moment, and a handler that interrupts one
    of them in the same thread would wait for that lock for ever. SimpleQueue is reentrant.
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
        """Wait until it is set, at most ``timeout_s``. Returns whether it is set."""
        try:
            self._wake.get(timeout=timeout_s)
        except queue.Empty:
            return self._is_set
        self._wake.put(None)  # for other waiting threads
        return True

    def set_on_signals(self) -> None:
        """From now on, SIGTERM and SIGINT set the flag. Call it in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.set())
