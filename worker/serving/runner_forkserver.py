"""The forkserver of a worker. It imports what runners need, which takes from five seconds to half a minute."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from qbatch.core.settings import Settings
from qbatch.worker.machine.pid_space import pid_space
from qbatch.worker.serving.sockets import own_sockets

_PRELOAD = [
    "qbatch.worker.serving.ignore_sigterm",
    "qbatch.worker.serving.quick_end",
    "qbatch.worker.serving.runner_imports",
]
PRELOAD_ON_CPU = [*_PRELOAD, "qbatch.worker.serving.cpu_runner_imports"]
"""A CPU's worker has no CUDA to keep away from: what each of its runners would import again, 1.2 s of a core."""


def begin_imports(settings: Settings, *, on_cpu: bool) -> ForkServerContext:
    """Start the forkserver, unless it runs, and do not wait for it. It inherits this process's environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD_ON_CPU if on_cpu else _PRELOAD)
    with own_sockets(Path(f"{settings.socket_dir}-{pid_space().rpartition(':')[2]}")):
        forkserver.ensure_running()
    return context
