"""Watches the memory of a stack's long-lived processes while it does many small jobs.

    python -m benchmarks.long_lived                             (1,000 jobs of which only the size is asked)
    python -m benchmarks.long_lived --jobs 200 --every 20 --full

Runs ``qbatch up --cpu`` and ``qbatch flower`` as a user does. Each model is a new one, so that nothing is answered by
an earlier result, and every bundle has ended when memory is read. KiB a job is the slope of a line through the samples
of the second half, because caches still fill in the first. Ends with 1 if a process grows by more than its limit, or
holds more files or threads than at the beginning of that half.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import redis
from sqlalchemy import ColumnElement, func, select

from benchmarks.polling import wait_until
from benchmarks.quantize import in_fresh_process
from benchmarks.random_source import build_source, build_tokenizer
from benchmarks.report import log
from qbatch.core.domain import DeviceKind, JobState
from qbatch.core.settings import Settings
from qbatch.core.sources import parse_source
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.submit import Submission, send_now, submit
from qbatch.worker.measuring import DEFAULT_EVAL_TEXT

_BITS = (8, 4)
# Flower keeps the tasks that it shows, 10,000 at most. Of the others, SQLite's cache fills up to 2 MiB a connection.
_MOST_KIB_A_JOB = {"Flower": 8.0}
_MOST_KIB_A_JOB_OF_OTHERS = 2.0
_POLL_S = 0.2
# A runner that has reported everything still has to end, and the next one to stand by.
_SETTLE_S = 3.0
_READY_FILE = "workers.log"
# What a command line must contain. Forkserver and runner look alike, but a runner's parent is a forkserver.
_NAMES = (
    ("redis-server", "Redis"),
    ("qbatch.scheduler", "scheduler"),
    ("qbatch.worker launch", "worker launcher"),
    ("qbatch.worker serve", "Celery worker"),
    ("multiprocessing.forkserver", "forkserver"),
    ("multiprocessing.resource_tracker", "resource tracker"),
    ("qbatch up", "qbatch up"),
    ("qbatch flower", "Flower"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """What one process holds at one moment. ``pss_kib`` counts a page that n processes share as an n-th."""

    jobs: int
    rss_kib: int
    pss_kib: int
    files: int
    threads: int


@dataclass(slots=True, kw_only=True)
class Watched:
    """The samples of each process, by name, and the keys in Redis after as many jobs."""

    samples: dict[str, list[MemorySample]] = field(default_factory=dict)
    redis_keys: list[int] = field(default_factory=list)

    def add(self, jobs: int, processes: Mapping[str, psutil.Process], keys: int) -> None:
        for name, process in processes.items():
            self.samples.setdefault(name, []).append(_sample(process, jobs))
        self.redis_keys.append(keys)

    def kib_a_job(self, name: str) -> float:
        samples = self._second_half(name)
        return statistics.linear_regression([one.jobs for one in samples], [one.rss_kib for one in samples]).slope

    def faults(self) -> Iterator[str]:
        for name in self.samples:
            most = _MOST_KIB_A_JOB.get(name, _MOST_KIB_A_JOB_OF_OTHERS)
            if (slope := self.kib_a_job(name)) > most:
                yield f"{name} grows by {slope:.1f} KiB a job, over {most:g}"
            first, *_, last = self._second_half(name)
            if last.files > first.files or last.threads > first.threads:
                yield f"{name} went from {first.files} to {last.files} files, {first.threads} to {last.threads} threads"
        middle = len(self.redis_keys) // 2
        if self.redis_keys[-1] > self.redis_keys[middle]:
            yield f"Redis went from {self.redis_keys[middle]} to {self.redis_keys[-1]} keys"

    def _second_half(self, name: str) -> Sequence[MemorySample]:
        samples = self.samples[name]
        return samples[len(samples) // 2 :]


def _sample(process: psutil.Process, jobs: int) -> MemorySample:
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB", rollup, re.MULTILINE)}
    return MemorySample(
        jobs=jobs,
        rss_kib=kib["Rss"],
        pss_kib=kib["Pss"],
        files=process.num_fds(),
        threads=process.num_threads(),
    )


class Services:
    """The stack and Flower, as processes of their own."""

    def __init__(self, home: Path) -> None:
        self._port = _free_port()
        self._environ = os.environ | {
            "QBATCH_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "QBATCH_FLOWER_AUTH": "benchmark:benchmark",
        }
        self.settings = Settings.from_env(self._environ)
        self.database = Database(self.settings.sqlalchemy_url)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Returns once the worker takes jobs."""
        self._start("up", "--cpu")
        path = self.settings.home / "logs" / _READY_FILE
        wait_until(lambda: path.exists() and " ready." in path.read_text(), "worker", poll_s=_POLL_S)
        self._start("flower", "--port", str(self._port))
        wait_until(self._flower_listens, "Flower", poll_s=_POLL_S)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            process.wait()
        self.database.dispose()

    def run(self, models: Sequence[Path], grid: Grid) -> None:
        """Submit the models and wait for their end. Raises RuntimeError if a job fails."""
        submission = Submission(
            sources=tuple(parse_source(str(model)) for model in models),
            grid=grid,
            eval_text=DEFAULT_EVAL_TEXT.read_text(),
        )
        batch_id = submit(self.database, self.settings, submission).batch_id
        send_now(self.database, self.settings)
        wait_until(lambda: self._count(batch_id, Job.finished_at.is_(None)) == 0, "end of a batch", poll_s=_POLL_S)
        if failed := self._count(batch_id, Job.state != JobState.SUCCEEDED):
            raise RuntimeError(f"{failed} jobs did not succeed")
        time.sleep(_SETTLE_S)

    def processes(self) -> Mapping[str, psutil.Process]:
        found: dict[str, psutil.Process] = {}
        for root in self._processes:
            parent = psutil.Process(root.pid)
            for process in (parent, *parent.children(recursive=True)):
                if (name := _name(process)) is not None:
                    found[name] = process
        return found

    def redis_keys(self) -> int:
        with redis.Redis.from_url(self.settings.redis_url) as client:
            return int(client.dbsize())

    def _count(self, batch_id: int, condition: ColumnElement[bool]) -> int:
        with self.database.read() as session:
            counted = select(func.count()).select_from(Job).where(Job.batch_id == batch_id, condition)
            return int(session.execute(counted).scalar_one())

    def _start(self, *arguments: str) -> None:
        with (self.settings.home.parent / f"{arguments[0]}.log").open("wb") as output:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "qbatch", *arguments], env=self._environ, stdout=output, stderr=output
                )
            )

    def _flower_listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0


def _name(process: psutil.Process) -> str | None:
    line = " ".join(process.cmdline())
    parent = process.parent()
    if "multiprocessing.forkserver" in line and parent and "multiprocessing.forkserver" in " ".join(parent.cmdline()):
        return None
    return next((name for part, name in _NAMES if part in line), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def build_models(folder: Path, count: int) -> Sequence[Path]:
    """Models of one tiny shape, which differ in their first weight."""
    first = folder / "model-0"
    in_fresh_process(build_source, "tiny", first, 0)
    build_tokenizer(first)
    models = [first]
    for number in range(1, count):
        models.append(folder / f"model-{number}")
        shutil.copytree(first, models[-1])
        with (models[-1] / "model.safetensors").open("r+b") as weights:
            start = 8 + int.from_bytes(weights.read(8), "little")
            weights.seek(start)
            weights.write(number.to_bytes(2, "little"))
    return models


@contextmanager
def running(home: Path) -> Iterator[Services]:
    services = Services(home)
    try:
        services.start()
        yield services
    finally:
        services.stop()


def watch(folder: Path, *, jobs: int, every: int, full: bool) -> Watched:
    models = build_models(folder, jobs // len(_BITS))
    parts = {} if full else {"quality": False, "speed": False, "why": False, "energy": False}
    grid = Grid(bits=_BITS, baseline=False, device=DeviceKind.CPU, **parts)  # type: ignore[arg-type]
    watched = Watched()
    at_once = every // len(_BITS)
    with running(folder / "home") as services:
        watched.add(0, services.processes(), services.redis_keys())
        for start in range(0, len(models), at_once):
            began = time.monotonic()
            services.run(models[start : start + at_once], grid)
            done = len(_BITS) * min(start + at_once, len(models))
            watched.add(done, services.processes(), services.redis_keys())
            log(f"{done} jobs; the last {every} took {time.monotonic() - began:.0f} s")
    return watched


def show(watched: Watched) -> None:
    counts = [one.jobs for one in next(iter(watched.samples.values()))]
    print("\nRSS, MiB | " + " | ".join(f"{count:,}" for count in counts) + " | PSS | KiB a job | files | threads")
    for name, samples in watched.samples.items():
        print(
            f"{name} | " + " | ".join(f"{one.rss_kib / 1024:.1f}" for one in samples),
            f" | {samples[-1].pss_kib / 1024:.1f} | {watched.kib_a_job(name):.2f}",
            f" | {samples[0].files} → {samples[-1].files} | {samples[0].threads} → {samples[-1].threads}",
            sep="",
        )
    print("keys in Redis | " + " | ".join(map(str, watched.redis_keys)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100, help="jobs between two samples")
    parser.add_argument("--full", action="store_true", help="measure quality and speed too")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary directory)")
    options = parser.parse_args(arguments)
    work = Path(tempfile.mkdtemp(prefix="qbatch-bench-", dir=options.folder))
    try:
        watched = watch(work, jobs=options.jobs, every=options.every, full=options.full)
    finally:
        shutil.rmtree(work)
    show(watched)
    faults = list(watched.faults())
    print("\n".join(faults) or "nothing grows")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
