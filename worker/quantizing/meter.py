"""How far a pass has come."""

from __future__ import annotations

import threading

from qbatch.worker.quantizing.target import Progress

REPORT_INTERVAL_S = 0.25
"""How often who waits for the work reports."""


class Meter:
    """Counts bytes from any thread, and reports them from one."""

    def __init__(self, on_progress: Progress) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._read = self._written = self._planned = 0

    def plan(self, nbytes: int) -> None:
        """More bytes will be read or written."""
        with self._lock:
            self._planned += nbytes

    def read(self, nbytes: int) -> None:
        with self._lock:
            self._read += nbytes

    def wrote(self, nbytes: int) -> None:
        with self._lock:
            self._written += nbytes

    def settle(self) -> None:
        """What has not been read or written by now will not be: those whose it was have failed."""
        with self._lock:
            self._planned = self._read + self._written

    def report(self) -> None:
        if total := max(self._planned, self._read + self._written):
            self._on_progress(self._read, self._written, total)
