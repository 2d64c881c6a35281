"""Starts the process from which a worker forks its runners, with what they import."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from qbatch.core.domain import DeviceKind
from qbatch.core.errors import ForkserverKilled, NoSuchDevice, UsageError
from qbatch.core.settings import Settings
from qbatch.worker.machine.pid_space import pid_space
from qbatch.worker.serving.sockets import own_sockets

_ALWAYS = (
    "qbatch.worker.serving.ignore_sigterm",
    "qbatch.worker.serving.quick_end",
    "qbatch.worker.serving.runner_imports",
)
PRELOADED = {
    DeviceKind.CUDA: (*_ALWAYS, "qbatch.worker.serving.gpu_runner_imports"),
    # A CPU has no CUDA to keep away from, so bitsandbytes is imported before the fork too.
    DeviceKind.CPU: (*_ALWAYS, "qbatch.worker.serving.cpu_runner_imports"),
}
"""The modules that the forkserver imports, by the kind of device."""
_NOT_IMPORTED, _CUDA_INITIALISED = 1, 2


def begin_imports(settings: Settings, kind: DeviceKind) -> ForkServerContext:
    """Start the forkserver, and do not wait for it. It inherits the environment. Call it once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED[kind]))
    with own_sockets(Path(f"{settings.socket_dir}-{pid_space().rpartition(':')[2]}")):
        forkserver.ensure_running()
    return context


def await_imports(context: ForkServerContext) -> None:
    """Wait for the forkserver's imports, so that no claimed job waits for them while its lease runs.

    Raises NoSuchDevice or UsageError if runners cannot work here, and ForkserverKilled.
    """
    first = context.Process(target=_exit_as_a_runner, daemon=True)
    try:
        first.start()
    except (EOFError, ConnectionError) as error:
        raise ForkserverKilled("the process that starts runners ended before it started the first one") from error
    first.join()
    if first.exitcode == _CUDA_INITIALISED:
        raise NoSuchDevice("runners could not use the GPU: something that they import initialises CUDA too early")
    if first.exitcode == _NOT_IMPORTED:
        raise UsageError("runners cannot import what they need: `qbatch doctor` says what is missing")
    # Not a refusal: whoever killed it, perhaps the kernel for lack of memory, need not do so again.
    if first.exitcode:
        raise ForkserverKilled(f"the first runner was killed while it started (exit code {first.exitcode})")


def _exit_as_a_runner() -> None:
    """End with what a runner would find. A fork of a process that has initialised CUDA cannot use it."""
    if "qbatch.worker.serving.runner_imports" not in sys.modules:
        sys.exit(_NOT_IMPORTED)
    sys.exit(_CUDA_INITIALISED if sys.modules["torch"].cuda._is_in_bad_fork() else 0)
