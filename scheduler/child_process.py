"""Child processes that end with their parent and are restarted when they die; and hiding this process from others."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qbatch.core.errors import DatabaseReplaced

log = logging.getLogger("qbatch.process")

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_MAX_BACKOFF_S = 30.0
_HEALTHY_AFTER_S = 60.0

REFUSALS = (2, 3)
"""Exit codes of a process that cannot work as configured. Restarting it would not help."""

ORPHANED = 70
"""The exit code of a process that ends because the one that it works for has ended."""

FINAL = DatabaseReplaced.exit_code
"""A process with this exit code is never restarted: it would create an empty database and use that."""


def dies_with_parent() -> Callable[[], None] | None:
    """A ``preexec_fn`` that makes the kernel send SIGTERM to the child when the thread that started it ends (Linux)."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def set_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent ended before prctl was called
            os.kill(os.getpid(), signal.SIGTERM)

    return set_signal


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, even if this one stands still then, stopped with SIGSTOP
    or in a kernel (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def hide_from_equals() -> None:
    """Prevent other processes of this user from reading this one's environment and memory (Linux).

    Those may be processes that run a model's own code. This process can then not be traced and leaves no core dump.
    Child processes are not hidden.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


class Child:
    """One process. ``supervise`` restarts it, after a delay that grows while the process keeps dying early."""

    def __init__(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], log_path: Path | None = None) -> None:
        self.name = name
        self._argv = list(argv)
        self._env = dict(env)
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_after = 0.0
        self._backoff_s = 0.5
        self._was_healthy = False

    @property
    def has_refused(self) -> bool:
        """Whether it ended with an exit code of REFUSALS or FINAL and will not be restarted."""
        return self._start_after == math.inf

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process. Its output is appended to the log file, if there is one."""
        self._started_at = time.monotonic()
        # In a session of its own, so that Ctrl-C at the terminal reaches only this process, which passes it on.
        options = {"start_new_session": True, "preexec_fn": dies_with_parent(), "stdin": subprocess.DEVNULL}
        if self._log_path is None:
            self._process = subprocess.Popen(self._argv, env=self._env, **options)  # type: ignore[call-overload]
            return
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as output:
            self._process = subprocess.Popen(  # type: ignore[call-overload]
                self._argv, env=self._env, stdout=output, stderr=subprocess.STDOUT, **options
            )

    def supervise(self) -> int | None:
        """Restart the process if it has ended and did not refuse to work. Returns its exit code once, else None.

        After it has worked for a while, only FINAL counts as a refusal: other failures may be temporary.
        """
        if self._process is None:
            if time.monotonic() >= self._start_after:
                self.start()
            return None
        code = self._process.poll()
        if code is None:
            return None
        self._process = None
        lived_s = time.monotonic() - self._started_at
        self._was_healthy = self._was_healthy or lived_s > _HEALTHY_AFTER_S
        if code == FINAL or (code in REFUSALS and not self._was_healthy):
            self._start_after = math.inf
            return code
        self._backoff_s = 0.5 if lived_s > _HEALTHY_AFTER_S else min(self._backoff_s * 2, _MAX_BACKOFF_S)
        self._start_after = time.monotonic() + self._backoff_s
        log.warning("%s ended with exit code %s; restarting it in %.1f s", self.name, code, self._backoff_s)
        return code

    def ask_to_stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, timeout_s: float | None) -> None:
        """Wait until the process ends, and kill it after ``timeout_s``."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            log.warning("%s did not stop within %s s and is killed", self.name, timeout_s)
            self._process.kill()
            self._process.wait()
        self._process = None
