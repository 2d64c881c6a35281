"""What else this worker does on the host stands still while a runner times something."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psutil


class TimingPauses:
    """Stops a process of this user while something is timed: the one that fetches the next source."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: psutil.Process | None = None
        self._is_timing = False

    def pause_while_timing(self, pid: int) -> None:
        """From now on stop the process ``pid``, at once if something is timed just now."""
        with self._lock, contextlib.suppress(psutil.NoSuchProcess):
            # It knows when the process began, and sends nothing to another one that has got its pid.
            self._process = psutil.Process(pid)
            if self._is_timing:
                self._process.suspend()

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """A context in which that process stands still."""
        self._set(is_timing=True)
        try:
            yield
        finally:
            self._set(is_timing=False)

    def _set(self, *, is_timing: bool) -> None:
        with self._lock:
            self._is_timing = is_timing
            if self._process is None:
                return
            try:
                self._process.suspend() if is_timing else self._process.resume()
            except psutil.NoSuchProcess:
                self._process = None
