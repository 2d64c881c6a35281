"""The progress of quantization, in bytes."""

from __future__ import annotations

import threading

from qbatch.worker.quantizing.target import Progress

REPORT_INTERVAL_S = 0.25
"""How often the thread that waits for the work reports progress."""


class Meter:
    """Counts bytes. Any thread may count; one thread reports."""

    def __init__(self, on_progress: Progress) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._read = self._written = self._planned = 0

    def plan(self, nbytes: int) -> None:
        """Add ``nbytes`` that will be read or written."""
        with self._lock:
            self._planned += nbytes

    def read(self, nbytes: int) -> None:
        with self._lock:
            self._read += nbytes

    def wrote(self, nbytes: int) -> None:
        with self._lock:
            self._written += nbytes

    def drop_remaining(self) -> None:
        """Take everything not yet read or written out of the plan, for example because its target failed."""
        with self._lock:
            self._planned = self._read + self._written

    def report(self) -> None:
        if total := max(self._planned, self._read + self._written):
            self._on_progress(self._read, self._written, total)
