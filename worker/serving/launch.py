"""Run one Celery worker process for each device of this machine, and restart those that die."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence

from qbatch.core.errors import QbatchError
from qbatch.core.settings import Settings
from qbatch.scheduler.child_process import Child
from qbatch.scheduler.stop import Stop
from qbatch.worker.machine.gpu import Gpu, choose_gpus, installed_gpus, visible_gpus
from qbatch.worker.machine.logs import log_to_stderr
from qbatch.worker.serving.broker_wait import why_no_broker
from qbatch.worker.serving.usable_folders import check_environment

log = logging.getLogger("qbatch.worker")

_SUPERVISE_S = 0.5
_DRAIN_S = 25.0


def devices_for(gpus: str | None, cpu: bool, environ: Mapping[str, str]) -> tuple[Gpu | None, ...]:
    """The devices to serve, with None for the CPU. By default all GPUs, or the CPU if there are none.

    Raises NoSuchDevice if a requested GPU does not exist.
    """
    chosen: tuple[Gpu | None, ...] = ()
    visible = visible_gpus(installed_gpus(), environ)
    if gpus is not None:
        chosen = choose_gpus(gpus, visible)
    elif not cpu:
        chosen = visible
    return (*chosen, None) if cpu or not chosen else chosen


def worker_environment(device: Gpu | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment that binds a worker to its device and silences the libraries that it loads."""
    return {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        **environ,
        "CUDA_VISIBLE_DEVICES": device.uuid if device is not None else "",
        # CUDA then numbers devices by PCI bus, as NVML does.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _argv(device: Gpu | None, *, drain: bool) -> list[str]:
    # -P keeps the current directory out of sys.path, so that nothing in it is imported instead of our modules.
    argv = [sys.executable, "-P", "-m", "qbatch.worker", "serve"]
    if device is not None:
        argv += ["--uuid", device.uuid]
    return [*argv, "--drain"] if drain else argv


def launch(devices: Sequence[Gpu | None], *, drain: bool, environ: Mapping[str, str]) -> int:
    """Run the workers until SIGTERM or SIGINT, then stop them. Returns the exit code.

    With ``drain``, waits until they have finished their jobs.
    """
    stop = Stop()
    stop.set_on_signals()
    children = [
        Child(
            f"worker on {device.uuid if device is not None else 'the CPU'}",
            _argv(device, drain=drain),
            env=worker_environment(device, environ),
        )
        for device in devices
    ]
    for child in children:
        child.start()
    code = _supervise(children, stop)
    for child in children:
        child.ask_to_stop()
    deadline = time.monotonic() + _DRAIN_S
    for child in children:
        child.wait(None if drain else max(deadline - time.monotonic(), 0.0))
    return code


def _supervise(children: Sequence[Child], stop: Stop) -> int:
    """Restart children until told to stop or all have refused to work: one bad GPU does not stop the others."""
    refused: dict[str, int] = {}
    while not stop.wait(_SUPERVISE_S):
        for child in children:
            code = child.supervise()
            if code is not None and child.has_refused:
                refused[child.name] = code
        if len(refused) == len(children):
            return max(refused.values())
    return 0


def main(gpus: str | None, cpu: bool, drain: bool) -> int:
    """``qbatch worker``. Returns the exit code; errors go to stderr as one line."""
    log_to_stderr()
    try:
        settings = Settings.from_env(os.environ)
        check_environment(settings)
        devices = devices_for(gpus, cpu, os.environ)
    except QbatchError as error:
        print(f"qbatch worker: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    # Reported before the workers import what they need, which takes a while.
    if (reason := why_no_broker(settings)) is not None:
        log.warning("%s; the workers wait for it", reason)
    return launch(devices, drain=drain, environ=os.environ)
