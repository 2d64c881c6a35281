"""Stopping a worker charges no job, however and how often the signals arrive."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import psutil
import pytest

from tests.faults.conftest import MakeModel
from tests.faults.fleet import Fleet


@pytest.mark.parametrize(("options", "outcomes"), [([], ["handed_back", "succeeded"]), (["--drain"], ["succeeded"])])
def test_sigterm_to_all_of_a_workers_processes_at_once_charges_nobody(
    fleet: Fleet, make_model: MakeModel, options: list[str], outcomes: list[str]
) -> None:
    """As systemd ends a service, and Slurm a job."""
    fleet.stop("w1")
    fleet.stop("w2")
    fleet.start("w1", "worker", "--cpu", *options)
    fleet.wait_for_live(1)
    (job,) = fleet.submit(make_model(large=True))
    fleet.wait_for_runner(job)
    launcher = fleet.running.pop("w1")
    for process in [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    assert launcher.wait(60.0) == 0
    for name in ("w1", "w2"):
        fleet.start(name, "worker", "--cpu")
    fleet.succeed([job])
    assert fleet.outcomes(job) == outcomes
    assert fleet.job(job).failures == 0
    fleet.wait_for_live(2)


@pytest.mark.parametrize("who", ["launcher", "worker"])
def test_repeated_sigterm_hands_a_job_back_once(fleet: Fleet, make_model: MakeModel, who: str) -> None:
    """One signal arrives while another is handled: a service manager's beside the launcher's, for one."""
    (job,) = fleet.submit(make_model(large=True))
    worker = fleet.wait_for_runner(job).worker
    (name,) = (name for name in ("w1", "w2") if fleet.celery(name).pid == worker.pid)
    launcher = fleet.running.pop(name)
    told = worker if who == "worker" else psutil.Process(launcher.pid)
    # Most meet the handling of one before; on a busy machine it may have ended before all are sent.
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(2000):
            told.terminate()
    launcher.terminate()
    assert launcher.wait(60.0) == 0
    assert "killed" not in fleet.log(name).read_text()
    fleet.start(name, "worker", "--cpu")
    fleet.succeed([job])
    assert fleet.outcomes(job) == ["handed_back", "succeeded"]
    assert fleet.job(job).failures == 0
    fleet.wait_for_live(2)


_TOLD_EARLY = """
import os, signal, sys
import qbatch.worker.serving.celery_worker as serve
from qbatch.worker.serving.serve import main

def told(before):
    def first(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return before(*args)
    return first

if sys.argv[1] == "while it sweeps":
    serve.CeleryWorker._sweep = told(serve.CeleryWorker._sweep)
else:
    serve.make_app = told(serve.make_app)
raise SystemExit(main(None, drain=True))
"""


@pytest.mark.parametrize("when", ["while it sweeps", "before Celery listens"])
def test_sigterm_before_it_is_ready_stops_a_worker(fleet: Fleet, when: str) -> None:
    """Celery handles signals only once it runs; what it has not heard of would keep it waiting for ever."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _TOLD_EARLY, when],
        env=fleet.qbatch.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    fleet.wait_for_live(2)
