"""Measures how long the workers of a large fleet wait for the database, at the cadence of real ones.

    python -m benchmarks.large_fleet                                   (200 workers for a minute on each database)
    python -m benchmarks.large_fleet --workers 50 --seconds 30 --databases sqlite

The workers do no work: they claim bundles, renew heartbeats and leases, look whether their jobs are still theirs, note
stages and record results, through the functions that real workers use and as often as those do. They are threads of a
few processes, each with connections of its own. A scheduler fills the window every second. All this runs on one machine
with the database's server, so part of each wait is waiting for a processor: ``machine`` is by how much a thread that
only sleeps woke up too late, measured in the same processes. Exits with 1 if a heartbeat's p99 is over a third of a
lease.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from benchmarks.submit_many import database_url
from qbatch.core.domain import Claim, DeviceKind, JobSpec, Method, Scheme, SourceRef, Stage, Token
from qbatch.core.errors import DatabaseUnreachable
from qbatch.core.settings import Settings
from qbatch.models_db import jobs, leases, window, workers
from qbatch.models_db.batches import NewJob, are_of_one_model
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.scheduler.dispatch import top_up
from qbatch.worker.measuring.stats import percentile
from tests.rows import PROTOCOL, a_batch, measured

_THREADS = 25
_CHECK_S = 1.5
_STAGES = (Stage.QUANTIZING, Stage.PUBLISHING, Stage.LOADING, Stage.BENCHMARKING)
_METHODS = (Method.NONE, Method.INT8, Method.NF4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """``job_s`` is how long a bundle runs. ``spread`` workers start at different times, others all at once."""

    url: str
    workers: int
    seconds: float
    job_s: float
    spread: bool
    settings: Settings


@dataclass(slots=True)
class Waits:
    """How long each kind of transaction took, in seconds, and how many were refused."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    refused: int = 0

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except DatabaseUnreachable:
            self.refused += 1
        self.seconds.setdefault(kind, []).append(time.perf_counter() - began)


class SimulatedWorker:
    """One worker: a thread that beats, and one that runs bundles."""

    def __init__(self, load: Load, number: int, messages: Any, until: float) -> None:
        self._load = load
        self._database = Database(load.url, frozen_s=load.settings.lease_s)
        self._messages = messages
        self._until = until
        self.waits = Waits()
        with self._database.write() as session:
            self._id = workers.register(session, _info(number))
        self._threads = [threading.Thread(target=work) for work in (self._beat, self._work)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._database.dispose()

    def _sleep(self, seconds: float) -> bool:
        """Whether there is time left after it."""
        time.sleep(max(0.0, min(seconds, self._until - time.monotonic())))
        return time.monotonic() < self._until

    def _offset(self, seconds: float) -> float:
        return random.uniform(0.0, seconds) if self._load.spread else 0.0

    def _beat(self) -> None:
        heartbeat_s = self._load.settings.heartbeat_s
        self._sleep(self._offset(heartbeat_s))
        renew_at = time.monotonic()
        while self._sleep(heartbeat_s / 3):
            if time.monotonic() >= renew_at:
                renew_at = time.monotonic() + heartbeat_s
                with self.waits.timed("heartbeat"), self._database.write() as session:
                    self._database.require_same(session)
                    workers.beat(session, self._id)
            with self.waits.timed("schema"), self._database.read() as session:
                self._database.require_own(session)

    def _work(self) -> None:
        self._sleep(self._offset(self._load.job_s))
        while time.monotonic() < self._until:
            try:
                message: window.Dispatch = self._messages.get(timeout=0.5)
            except Empty:
                continue
            claims: list[Claim] = []
            with self.waits.timed("claim"), self._database.write() as session:
                self._database.require_own(session)
                are_of_one_model(session, message.job_ids)
                claims = jobs.claim(session, message.job_ids, self._id, self._load.settings.lease_s)
                window.take_out(session, [message.dispatch_id])
            self._run([(claim.job_id, claim.attempt) for claim in claims])

    def _run(self, tokens: Sequence[Token]) -> None:
        ends = time.monotonic() + self._load.job_s
        stages = iter(_STAGES)
        renew_at = time.monotonic()
        while time.monotonic() < ends:
            if not self._sleep(_CHECK_S):
                return
            if stage := next(stages, None):
                with self.waits.timed("note"), self._database.write() as session:
                    self._database.require_same(session)
                    for token in tokens:
                        jobs.note(session, token, stage=stage, work_started=True)
            if time.monotonic() >= renew_at:
                renew_at = time.monotonic() + self._load.settings.heartbeat_s
                with self.waits.timed("lease"), self._database.write() as session:
                    self._database.require_same(session)
                    jobs.heartbeat(session, tokens, self._load.settings.lease_s)
            else:
                with self.waits.timed("look"), self._database.read() as session:
                    self._database.require_same(session)
                    jobs.held(session, tokens)
        for token in tokens:
            with self.waits.timed("result"), self._database.write() as session:
                self._database.require_own(session)
                protocol = PROTOCOL.for_device(DeviceKind.CPU)
                jobs.succeed(session, token, measured(), protocol=protocol, checkpoint_path=None)


def _info(number: int) -> workers.WorkerInfo:
    return workers.WorkerInfo(
        name=f"w{number}",
        host=f"host-{number // 8}",
        pid=number,
        pid_space=f"simulated {number // 8}",
        device_kind=DeviceKind.CPU,
        device_name="a CPU",
        device_uuid=None,
        memory_bytes=1,
    )


def serve(load: Load, numbers: Sequence[int], messages: Any, start: Any, results: Any) -> None:
    """Run the workers ``numbers`` in this process."""
    lateness: list[float] = []
    start.wait()
    until = time.monotonic() + load.seconds
    fleet = [SimulatedWorker(load, number, messages, until) for number in numbers]
    for worker in fleet:
        worker.start()
    while time.monotonic() < until:
        began = time.perf_counter()
        time.sleep(0.05)
        lateness.append(time.perf_counter() - began - 0.05)
    for worker in fleet:
        worker.join()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    results.put((lateness, [worker.waits for worker in fleet], usage.ru_utime + usage.ru_stime))
    messages.cancel_join_thread()


@dataclass(slots=True)
class DirectBroker:
    """Hands messages over to the workers without Redis."""

    messages: Any

    def send(self, dispatches: Sequence[window.Dispatch]) -> None:
        for dispatch in dispatches:
            self.messages.put(dispatch)


def run_scheduler(load: Load, messages: Any, ended: threading.Event, waits: Waits) -> None:
    database = Database(load.url, frozen_s=load.settings.lease_s)
    while not ended.wait(1.0):
        with waits.timed("top_up"):
            with database.write() as session:
                database.require_own(session)
                leases.acquire(session, leases.LEAD, "simulated", load.settings.lead_s)
            top_up(database, DirectBroker(messages), load.settings)  # type: ignore[arg-type]
    database.dispose()


def simulate(load: Load) -> Mapping[str, list[float]]:
    database = Database(load.url)
    upgrade(database)
    models = round(load.workers * (load.seconds / load.job_s + 5))
    a_batch(database, *[[_job(n, method) for method in _METHODS] for n in range(models)])
    database.dispose()
    context = multiprocessing.get_context("spawn")
    messages, results = context.Queue(), context.Queue()
    groups = [range(n, min(n + _THREADS, load.workers)) for n in range(0, load.workers, _THREADS)]
    start = context.Barrier(len(groups) + 1)
    processes = [context.Process(target=serve, args=(load, group, messages, start, results)) for group in groups]
    for process in processes:
        process.start()
    waits, ended = Waits(), threading.Event()
    scheduler = threading.Thread(target=run_scheduler, args=(load, messages, ended, waits))
    start.wait()
    scheduler.start()
    found: dict[str, list[float]] = {"machine": [], "cpu": []}
    refused = 0
    for lateness, each, cpu_s in [results.get() for _ in processes]:
        found["machine"] += lateness
        found["cpu"].append(cpu_s)
        for one in each:
            refused += one.refused
            for kind, seconds in one.seconds.items():
                found.setdefault(kind, []).extend(seconds)
    ended.set()
    scheduler.join()
    messages.cancel_join_thread()
    for process in processes:
        process.join()
    found["top_up"] = waits.seconds["top_up"]
    found["refused"] = [float(refused + waits.refused)]
    return found


def _job(number: int, method: Method) -> NewJob:
    source = SourceRef(name=f"organisation/model-{number}", location=f"organisation/model-{number}")
    spec = JobSpec(source=source, scheme=Scheme(method=method), dtype=_DTYPE, device=DeviceKind.CPU, protocol=PROTOCOL)
    return NewJob(spec=spec, bits=spec.scheme.bits(_DTYPE))


_DTYPE = measured().dtype


def show(name: str, found: Mapping[str, list[float]], load: Load) -> None:
    print(f"\n{name}: {load.workers} workers for {load.seconds:g} s, started {'apart' if load.spread else 'at once'};")
    print(f"{sum(found['cpu']):.0f} CPU s in their processes, {found['refused'][0]:.0f} transactions refused")
    print("| | number | p50 s | p99 s | longest s |\n|---|---|---|---|---|")
    for kind, seconds in found.items():
        if kind not in ("cpu", "refused"):
            print(
                f"| {kind} | {len(seconds)} | {percentile(sorted(seconds), 50):.3f} | {_p99(seconds):.2f} "
                f"| {max(seconds):.2f} |"
            )


def _p99(seconds: Sequence[float]) -> float:
    return percentile(sorted(seconds), 99)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--job-seconds", type=float, default=120.0)
    parser.add_argument("--at-once", action="store_true", help="all workers start in the same moment")
    parser.add_argument("--databases", default="sqlite,postgresql")
    options = parser.parse_args(arguments)
    missed = False
    for name in options.databases.split(","):
        with tempfile.TemporaryDirectory() as folder, database_url(name, Path(folder), connections=400) as url:
            load = Load(
                url=url,
                workers=options.workers,
                seconds=options.seconds,
                job_s=options.job_seconds,
                spread=not options.at_once,
                settings=Settings.from_env({**os.environ, "QBATCH_HOME": folder}),
            )
            found = simulate(load)
            show(name, found, load)
            if not found.get("heartbeat"):
                raise SystemExit(f"no beat was due in {options.seconds:g} s: give --seconds more")
            missed = missed or _p99(found["heartbeat"]) > load.settings.lease_s / 3
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
