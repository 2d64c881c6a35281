"""The process that captures and profiles decode steps for a runner: forked from it, or started anew.

A capture that fails spoils its process and a profiler slows it, so neither may be the runner. The runner's own imports
are shared by a fork, which must be made before the runner uses the GPU. A process that is started anew imports for 15 s
on some machines.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from qbatch.scheduler.child_process import end_with_parent
from qbatch.worker.measuring.why.kernels_process import serve

_STREAMS = (0, 1, 2)
_END_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsServer:
    """Requests are lines written to ``requests``, each has its line in ``answers``."""

    process: psutil.Process
    requests: IO[str]
    answers: IO[str]

    def end(self) -> None:
        """End it, and what it has forked, which the kernel ends with it."""
        # A buffered request to one that has died cannot be flushed any more.
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.kill()
        self.process.wait(_END_S)
        self.answers.close()


def fork_server() -> KernelsServer:
    """Fork this process, which must have a single thread, and must not have used the GPU."""
    for_requests, requests = os.pipe()
    answers, for_answers = os.pipe()
    pid = os.fork()
    if pid == 0:
        _serve_and_exit(for_requests, for_answers)
    os.close(for_requests)
    os.close(for_answers)
    return KernelsServer(process=psutil.Process(pid), requests=os.fdopen(requests, "w"), answers=os.fdopen(answers))


def start_server() -> KernelsServer:
    """Start a process anew: its first answer waits for its imports."""
    process = psutil.Popen(
        [sys.executable, "-P", "-m", "qbatch.worker.measuring.why.kernels_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # It forks, which is only safe with a single thread, so numpy must not start any.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    return KernelsServer(process=process, requests=process.stdin, answers=process.stdout)


def _serve_and_exit(requests: int, answers: int) -> None:
    """The life of the fork. It never returns to what the runner was doing."""
    try:
        end_with_parent()
        _close_all_but(requests, answers)
        serve(os.fdopen(requests), os.fdopen(answers, "w"))
    finally:
        os._exit(0)


def _close_all_but(*kept: int) -> None:
    """Close what the runner has open: by the end of its pipe, its worker knows that it has ended. But no device: a
    library may have opened it for good."""
    for descriptor in [int(entry.name) for entry in Path("/dev/fd").iterdir()]:
        if descriptor in (*_STREAMS, *kept):
            continue
        with contextlib.suppress(OSError):  # the one by which they were listed
            if not stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.close(descriptor)
