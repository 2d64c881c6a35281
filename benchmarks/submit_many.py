"""Measures ``qbatch submit`` of many jobs, and what another writer of the database meanwhile notices of it.

    python -m benchmarks.submit_many                                     (100,000 jobs on SQLite and on PostgreSQL)
    python -m benchmarks.submit_many --jobs 10000 --databases sqlite

The real command reads a list of made-up hub models and stores three jobs for each of them: its CPU time, wall time,
peak memory, and what a job takes up in the database. Meanwhile this process is a worker: it renews its heartbeat ten
times a second, and takes down how long each renewal took. Prints a table; exits with 1 if a target was missed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text

from qbatch.core.domain import DeviceKind
from qbatch.core.errors import DatabaseUnreachable
from qbatch.models_db import workers
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database

_JOBS_OF_A_MODEL = 3
_BEAT_S = 0.1
_MOST_S, _MOST_MIB, _LONGEST_WAIT_S = 10.0, 200.0, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitFigures:
    """One submit; its command's imports are part of it."""

    database: str
    jobs: int
    cpu_s: float
    wall_s: float
    peak_mib: float
    bytes_per_job: float
    longest_wait_s: float
    refused_beats: int

    def missed(self) -> list[str]:
        """What was asked of 100,000 jobs; of others, the time in proportion."""
        most_s = _MOST_S * max(1.0, self.jobs / 100_000)
        found = [f"{self.cpu_s:.1f} s of CPU time, over {most_s:.0f}"] if self.cpu_s > most_s else []
        found += [f"{self.peak_mib:.0f} MiB, over {_MOST_MIB:.0f}"] if self.peak_mib > _MOST_MIB else []
        found += [f"another writer waited {self.longest_wait_s:.2f} s"] if self.longest_wait_s > _LONGEST_WAIT_S else []
        found += [f"{self.refused_beats} heartbeats were refused"] if self.refused_beats else []
        return [f"{self.database}: {fault}" for fault in found]


class Heart:
    """Renews a worker's heartbeat until it is stopped. A context manager."""

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart")
        self.longest_s = 0.0
        self.refused = 0
        with self._database.write() as session:
            self._worker = workers.register(session, _a_worker())

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._database.dispose()

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_S):
            began = time.perf_counter()
            try:
                with self._database.write() as session:
                    workers.beat(session, self._worker)
            except DatabaseUnreachable:
                self.refused += 1
            self.longest_s = max(self.longest_s, time.perf_counter() - began)


def _a_worker() -> workers.WorkerInfo:
    return workers.WorkerInfo(
        name="benchmark",
        host="here",
        pid=os.getpid(),
        pid_space="benchmark",
        device_kind=DeviceKind.CPU,
        device_name="a CPU",
        device_uuid=None,
        memory_bytes=1,
    )


def measure(name: str, url: str, folder: Path, jobs: int) -> SubmitFigures:
    models = folder / f"{name}.txt"
    models.write_text("".join(f"organisation-{n % 97}/some-model-{n}-7b-instruct\n" for n in range(-(-jobs // 3))))
    submit = [sys.executable, "-m", "qbatch", "submit", "--models", str(models), "--bits", "4,8", "--format", "quiet"]
    environ = {**os.environ, "QBATCH_HOME": str(folder / name), "QBATCH_DATABASE_URL": url}
    upgrade(Database(url))
    before = stored_bytes(url)
    with Heart(url) as heart:
        began = time.perf_counter()
        process = subprocess.Popen(submit, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(submit)} ended with {process.returncode}")
    return SubmitFigures(
        database=name,
        jobs=_JOBS_OF_A_MODEL * -(-jobs // _JOBS_OF_A_MODEL),
        cpu_s=usage.ru_utime + usage.ru_stime,
        wall_s=wall_s,
        peak_mib=usage.ru_maxrss / 1024,
        bytes_per_job=(stored_bytes(url) - before) / jobs,
        longest_wait_s=heart.longest_s,
        refused_beats=heart.refused,
    )


def stored_bytes(url: str) -> int:
    """What tables and indexes take up."""
    database = Database(url)
    in_sqlite = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
    size = in_sqlite if database.is_sqlite else "SELECT pg_database_size(current_database())"
    with database.read() as session:
        found: int = session.execute(text(size)).scalar_one()
    database.dispose()
    return found


@contextmanager
def database_url(name: str, folder: Path, *, connections: int | None = None) -> Iterator[str]:
    """An empty database that is removed afterwards. A server takes so many ``connections``; None: as many as usual."""
    if name == "sqlite":
        yield f"sqlite:///{folder / 'qbatch.db'}"
        return
    from tests.postgres import Postgres

    server = Postgres()
    if connections is not None:
        database = Database(server.url)
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"ALTER SYSTEM SET max_connections = {connections}"))
        database.dispose()
        server.stop()
        server.start()
    try:
        yield server.url
    finally:
        server.close()


def show(figures: Sequence[SubmitFigures]) -> None:
    print("| database | jobs | CPU s | wall s | peak MiB | bytes a job | longest wait of a heartbeat | refused |")
    print("|---|---|---|---|---|---|---|---|")
    for one in figures:
        print(
            f"| {one.database} | {one.jobs:,} | {one.cpu_s:.1f} | {one.wall_s:.1f} | {one.peak_mib:.0f} "
            f"| {one.bytes_per_job:.0f} | {one.longest_wait_s:.2f} s | {one.refused_beats} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--databases", default="sqlite,postgresql")
    options = parser.parse_args(arguments)
    figures = []
    for name in options.databases.split(","):
        with tempfile.TemporaryDirectory() as folder, database_url(name, Path(folder)) as url:
            figures.append(measure(name, url, Path(folder), options.jobs))
    show(figures)
    missed = [fault for one in figures for fault in one.missed()]
    print("\n".join(missed) or "all targets were met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
