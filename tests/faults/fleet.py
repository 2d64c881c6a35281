"""Schedulers and workers as processes of their own on one database, Redis and storage; and ways to hurt them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil
from sqlalchemy import select

from qbatch.core.domain import Stage
from qbatch.core.errors import BrokerUnreachable
from qbatch.core.settings import Settings
from qbatch.core.sources import parse_source
from qbatch.models_db.database_id import database_id
from qbatch.models_db.listing import live_workers
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, Job, Result, Worker
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.submit import Submission, send_now, submit
from qbatch.worker.checkpoints.published import problems
from tests.acceptance.conftest import QBATCH, Qbatch, await_end_of, processes_of
from tests.chaos.processes import has_an_order
from tests.waiting import until

LEASE_S = 4.0
SCAN_S = 1.0
PACE = {
    "QBATCH_LEASE_S": str(LEASE_S),
    "QBATCH_HEARTBEAT_S": "1",
    "QBATCH_SCAN_S": str(SCAN_S),
    "QBATCH_BACKOFF_S": "0.2",
}
TEXT = "It was a quiet evening, and nobody had come. " * 40
_PATIENCE_S = 120.0
_POLL_S = 0.01
_SETTLE_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Caught:
    """A job stopped in a stage: its runner is suspended, and what it had said is in the database."""

    attempt: int
    worker: psutil.Process
    forkserver: psutil.Process
    runner: psutil.Process


@dataclass
class Fleet:
    """Everything that one home's processes are, by the names that a test gave them."""

    qbatch: Qbatch
    database: Database
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _logged: dict[str, int] = field(default_factory=dict)

    program = QBATCH

    @property
    def settings(self) -> Settings:
        return Settings.from_env(self.qbatch.environ)

    @property
    def logs(self) -> Path:
        with self.database.read() as session:
            return self.settings.logs_of(database_id(session))

    def log(self, name: str) -> Path:
        return self.qbatch.home.parent / f"{name}.log"

    def start(self, name: str, *args: str, **env: str) -> None:
        """``qbatch`` with ``args``, its output in ``log(name)``."""
        assert name not in self.running
        self._logged[name] = self.log(name).stat().st_size if self.log(name).exists() else 0
        qbatch = Qbatch(self.qbatch.home, self.qbatch.env | env, self.qbatch.cwd)
        self.running[name] = qbatch.start(*args, log=self.log(name))

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        process = self.running.pop(name)
        process.send_signal(number)
        return process.wait(60.0)

    def kill_host(self, name: str) -> None:
        """SIGKILL to a process and all that it started, at once: what a power cut leaves of them."""
        process = self.running.pop(name)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def close(self) -> None:
        self.resume_all()
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait(60.0)
        self.running.clear()
        self.database.dispose()
        await_end_of(self.qbatch.home)

    def resume_all(self) -> None:
        """What a test suspended, and left so because it failed."""
        for process in processes_of(self.qbatch.home):
            process.resume()

    def wait_for_workers(self, count: int) -> None:
        """``count`` workers that consume: their Celery has said so since they were started."""
        until(lambda: self._ready() >= count, f"{count} live workers")

    def wait_for_live(self, count: int) -> None:
        """``count`` workers whose heartbeat the database has; one that was killed and started again among them."""

        def live() -> int:
            with self.database.read() as session:
                return live_workers(session, LEASE_S)

        self.wait_for(lambda: live() == count, f"{count} live workers")

    def _ready(self) -> int:
        workers = [name for name in self.running if name.startswith("w")]
        return sum(b" ready." in self.log(name).read_bytes()[self._logged[name] :] for name in workers)

    # ------------------------------------------------------------------------------------------------- submitting

    def submit(
        self, *sources: Path | str, bits: Sequence[int] = (4,), baseline: bool = False, force: bool = False,
        send: bool = True,
    ) -> list[int]:  # fmt: skip
        """What ``qbatch submit`` does, without its start-up; the ids of the jobs."""
        submission = Submission(
            sources=tuple(parse_source(str(source)) for source in sources),
            grid=Grid(bits=tuple(bits), baseline=baseline, force=force),
            eval_text=TEXT,
        )
        receipt = submit(self.database, self.settings, submission)
        if send:
            # As the command line does: what cannot be sent now, the scheduler will send.
            with contextlib.suppress(BrokerUnreachable):
                send_now(self.database, self.settings)
        return self.jobs_of(receipt.batch_id)

    # ---------------------------------------------------------------------------------------------------- looking

    def jobs(self, ids: Sequence[int]) -> list[Job]:
        with self.database.read() as session:
            found = session.scalars(select(Job).where(Job.id.in_(ids)).order_by(Job.id)).all()
            session.expunge_all()
            return list(found)

    def jobs_of(self, batch_id: int) -> list[int]:
        with self.database.read() as session:
            return list(session.scalars(select(Job.id).where(Job.batch_id == batch_id).order_by(Job.id)))

    def job(self, job_id: int) -> Job:
        return self.jobs([job_id])[0]

    def outcomes(self, job_id: int) -> list[str | None]:
        """How each attempt of a job ended, the first first."""
        with self.database.read() as session:
            return list(session.scalars(select(Attempt.outcome).where(Attempt.job_id == job_id).order_by(Attempt.id)))

    def claimed_at(self, job_id: int) -> datetime:
        """When the job's last attempt began."""
        with self.database.read() as session:
            return session.scalars(
                select(Attempt.claimed_at).where(Attempt.job_id == job_id).order_by(Attempt.id.desc()).limit(1)
            ).one()

    def result(self, job_id: int) -> Result:
        with self.database.read() as session:
            found = session.get_one(Result, job_id)
            session.expunge(found)
            return found

    def celery(self, name: str) -> psutil.Process:
        """The Celery worker that a launcher of that name keeps alive."""
        found = [child for child in psutil.Process(self.running[name].pid).children() if "serve" in child.cmdline()]
        assert len(found) == 1
        return found[0]

    def worker_process(self, worker_id: int | None) -> psutil.Process:
        with self.database.read() as session:
            return psutil.Process(session.get_one(Worker, worker_id).pid)

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = _PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s\n{self._account()}"
            time.sleep(0.05)

    def wait_for_end_of(self, job_id: int, attempt: int, timeout_s: float) -> None:
        """Until the job is no longer that attempt's: queued again, claimed anew, or ended."""

        def is_over() -> bool:
            job = self.job(job_id)
            return job.attempt > attempt or job.state != "running"

        self.wait_for(is_over, f"end of attempt {attempt} of j{job_id}", timeout_s)

    def wait_for_state(self, ids: Sequence[int], *states: str, timeout_s: float = _PATIENCE_S) -> None:
        self.wait_for(lambda: all(job.state in states for job in self.jobs(ids)), f"{ids} {states}", timeout_s)

    def succeed(self, ids: Sequence[int], timeout_s: float = _PATIENCE_S) -> None:
        """Wait until all have ended; all must have succeeded."""
        self.wait_for_state(ids, "succeeded", "failed", "cancelled", timeout_s=timeout_s)
        assert {job.state for job in self.jobs(ids)} == {"succeeded"}, self._account()

    def _account(self) -> str:
        """What a failed wait wants to know."""
        with self.database.read() as session:
            rows = session.scalars(select(Job).order_by(Job.id)).all()
            lines = [
                f"j{job.id} {job.state} {job.stage} attempt {job.attempt} failures {job.failures} {job.error_message}"
                for job in rows
            ]
        logs = [f"--- {name}\n{self.log(name).read_text()[-3000:]}" for name in self.running]
        return "\n".join([*lines[-20:], *logs])

    # ---------------------------------------------------------------------------------------------------- storage

    def checkpoints(self) -> list[Path]:
        """Every published checkpoint; each must be whole whenever anybody looks."""
        folders = [folder for folder in self.settings.checkpoints.glob("*/*") if ".rejected-" not in folder.name]
        assert [problem for folder in folders for problem in problems(folder)] == []
        return folders

    def checkpoint_of(self, job_id: int) -> Path | None:
        """Where the job's checkpoint lies, once it is published."""
        key = self.job(job_id).checkpoint_key
        found = [folder for folder in self.checkpoints() if key and folder.name.endswith(key[:16])]
        return found[0] if found else None

    def staged(self) -> list[Path]:
        return sorted(self.settings.staging.glob("*/*/*-*"))

    def spooled(self) -> list[Path]:
        return sorted(self.settings.spool.glob("*.json"))

    # ---------------------------------------------------------------------------------------------------- hurting

    def suspend(self, *processes: psutil.Process) -> None:
        """SIGSTOP, while none of them writes: SQLite has one lock, and who is stopped with it stops everybody."""
        with self.database.write() as session:
            session.connection()  # takes the lock
            for process in processes:
                process.suspend()
            for process in processes:
                until(lambda process=process: process.status() == psutil.STATUS_STOPPED, "stop")  # type: ignore[misc]

    @contextmanager
    def suspended(self, *processes: psutil.Process) -> Iterator[None]:
        self.suspend(*processes)
        try:
            yield
        finally:
            for process in processes:
                if process.is_running():
                    process.resume()

    def wait_for_runner(self, job_id: int, *, after: int = 0) -> Caught:
        """The processes of the job's first attempt after number ``after``, left running."""
        found: Caught | None = None

        def has_runner() -> bool:
            nonlocal found
            job = self.job(job_id)
            if job.state == "running" and job.attempt > after:
                found = self._processes(job)
            return found is not None

        self.wait_for(has_runner, f"runner of j{job_id}")
        assert found is not None
        return found

    def _processes(self, job: Job) -> Caught | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker = self.worker_process(job.worker_id)
            for forkserver in worker.children():
                if "forkserver" not in " ".join(forkserver.cmdline()):
                    continue
                runners = [child for child in forkserver.children() if has_an_order(child)]
                if runners:
                    return Caught(attempt=job.attempt, worker=worker, forkserver=forkserver, runner=runners[0])
        return None

    def catch(
        self,
        job_id: int,
        stage: Stage,
        *,
        after: int = 0,
        once: Callable[[], object] = lambda: True,
        slipped: Callable[[], object] = lambda: None,
    ) -> Caught:
        """Suspend the job's runner in ``stage``, ``once`` that holds. An attempt that slips through is killed, and the
        next one watched after ``slipped`` was called."""
        for _ in range(8):
            caught = self.wait_for_runner(job_id, after=after)
            if self._suspend_in(stage, job_id, caught, once):
                return caught
            after = caught.attempt
            slipped()
        raise AssertionError(f"j{job_id} was never caught {stage}\n{self._account()}")

    def _suspend_in(self, stage: Stage, job_id: int, caught: Caught, once: Callable[[], object]) -> bool:
        order = list(Stage)
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            seen = self._stage(job_id, caught.attempt)
            if seen is None or order.index(seen) > order.index(stage):
                break
            if seen is stage and once():
                try:
                    caught.runner.suspend()
                except psutil.NoSuchProcess:  # it was quicker
                    break
                # What it had said by then is still on its way.
                time.sleep(_SETTLE_S)
                if self._stage(job_id, caught.attempt) is stage:
                    return True
                break
            time.sleep(_POLL_S)
        with contextlib.suppress(psutil.NoSuchProcess):
            caught.runner.kill()
        return False

    def _stage(self, job_id: int, attempt: int) -> Stage | None:
        """The stage of that attempt; None once it is over."""
        with self.database.read() as session:
            where = (Job.id == job_id, Job.attempt == attempt, Job.state == "running")
            stage = session.execute(select(Job.stage).where(*where)).scalar_one_or_none()
        return Stage(stage) if stage is not None else None
