"""What happens to a fleet: each fault hurts something real, and says what it hurt."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import redis
from sqlalchemy import select

from models_db.domain import DeviceKind, JobState, Stage
from models_db.session import Database
from models_db.settings import Settings
from models_db.tables import Job, Worker
from scheduler.queues import queue_of
from tests.chaos.processes import Role, children_of, family_of, kill, runner_of

_AIM_S = 3.0
_POLL_S = 0.005


@dataclass(slots=True)
class Faults:
    """The faults that a fleet can be dealt. Each returns what it hurt, None where there was nothing to hurt."""

    settings: Settings
    database: Database
    rng: random.Random
    stopped: dict[psutil.Process, float] = field(default_factory=dict)

    def kill_runner(self) -> str | None:
        """SIGKILL to a runner, in a stage chosen beforehand if one enters it soon."""
        stage = self.rng.choice(list(Stage))
        found = self._await_stage(stage)
        if found is None:
            return self._kill_one(Role.RUNNER)
        job_id, seen, worker_pid = found
        runner = runner_of(worker_pid)
        if runner is None:
            return None
        kill([runner])
        return f"pid {runner.pid}, j{job_id} {seen}"

    def kill_worker(self) -> str | None:
        """SIGKILL to a Celery worker alone: its runner and its forkserver must notice."""
        return self._kill_one(Role.WORKER)

    def kill_worker_and_runner(self) -> str | None:
        """SIGKILL to a Celery worker and all that it started."""
        return self._kill_family(Role.WORKER)

    def kill_forkserver(self) -> str | None:
        return self._kill_one(Role.FORKSERVER)

    def kill_launcher(self) -> str | None:
        return self._kill_one(Role.LAUNCHER)

    def kill_scheduler(self) -> str | None:
        return self._kill_one(Role.SCHEDULER)

    def kill_redis(self) -> str | None:
        return self._kill_one(Role.REDIS)

    def kill_stack(self) -> str | None:
        """SIGKILL to ``qbatch up`` alone: the kernel tells its children."""
        return self._kill_one(Role.STACK)

    def cut_power(self) -> str | None:
        """SIGKILL to ``qbatch up`` and all that it started."""
        return self._kill_family(Role.STACK)

    def flush_redis(self) -> str | None:
        with self._redis() as client:
            lost = sum(client.llen(key) for key in _lists(client))
            client.flushall()
            return f"{lost} messages"
        return None

    def lose_message(self) -> str | None:
        with self._redis() as client:
            for key in _lists(client):
                if client.rpop(key) is not None:
                    return repr(key)
        return None

    def repeat_message(self) -> str | None:
        """Put a second copy of a message beside the first: two workers get it at once."""
        with self._redis() as client:
            for key in _lists(client):
                message = client.lindex(key, -1)
                if message is not None:
                    client.rpush(key, message)
                    return repr(key)
        return None

    def stop_worker(self) -> str | None:
        """SIGSTOP to a Celery worker for longer than its lease; ``wake`` has it go on."""
        victims = [process for process in self._living(Role.WORKER) if process not in self.stopped]
        if not victims:
            return None
        victim = self.rng.choice(victims)
        seconds = self.settings.lease_s * self.rng.uniform(1.2, 2.5)
        victim.suspend()
        self.stopped[victim] = time.monotonic() + seconds
        return f"pid {victim.pid} for {seconds:.1f} s"

    def wake(self, *, all_: bool = False) -> None:
        """SIGCONT to those whose time has come."""
        for process, until in list(self.stopped.items()):
            if all_ or time.monotonic() >= until:
                del self.stopped[process]
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def _await_stage(self, stage: Stage) -> tuple[int, str, int] | None:
        """(job, stage, pid of its worker) of a running job that is at ``stage`` within a while, else of any."""
        deadline = time.monotonic() + _AIM_S
        while True:
            running = self._running()
            aimed = [found for found in running if found[1] == stage]
            if aimed:
                return self.rng.choice(aimed)
            if time.monotonic() > deadline:
                return self.rng.choice(running) if running else None
            time.sleep(_POLL_S)

    def _running(self) -> list[tuple[int, str, int]]:
        query = (
            select(Job.id, Job.stage, Worker.pid)
            .join(Worker, Worker.id == Job.worker_id)
            .where(Job.state == JobState.RUNNING)
            .order_by(Job.id)
        )
        with self.database.read() as session:
            return [(job_id, stage or "", pid) for job_id, stage, pid in session.execute(query)]

    def _kill_one(self, role: Role) -> str | None:
        victims = self._living(role)
        if not victims:
            return None
        victim = self.rng.choice(victims)
        kill([victim])
        return f"pid {victim.pid}"

    def _kill_family(self, role: Role) -> str | None:
        victims = self._living(role)
        if not victims:
            return None
        head = self.rng.choice(victims)
        family = [head, *children_of(head)]
        kill(family)
        return f"pid {head.pid} and {len(family) - 1} below it"

    def _living(self, role: Role) -> list[psutil.Process]:
        return family_of(self.settings.home)[role]

    @contextmanager
    def _redis(self) -> Iterator[redis.Redis]:
        """A connection; what is asked of a Redis that is down is not done."""
        client: redis.Redis = redis.Redis.from_url(self.settings.redis_url, socket_timeout=5, decode_responses=True)
        with client, contextlib.suppress(redis.RedisError):
            yield client


def _lists(client: redis.Redis) -> list[str]:
    """The lists in which messages wait for CPU workers, one for each priority."""
    queue = queue_of(DeviceKind.CPU)
    return [key for key in client.keys(f"{queue}*") if client.type(key) == "list"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A fault as the driver draws it. ``is_kill``: it ends processes by SIGKILL, and counts towards the kills."""

    name: str
    weight: int
    is_kill: bool
    deal: Callable[[Faults], str | None]


KINDS: tuple[Kind, ...] = (
    Kind(name="runner", weight=44, is_kill=True, deal=Faults.kill_runner),
    Kind(name="worker", weight=9, is_kill=True, deal=Faults.kill_worker),
    Kind(name="worker and runner", weight=5, is_kill=True, deal=Faults.kill_worker_and_runner),
    Kind(name="forkserver", weight=6, is_kill=True, deal=Faults.kill_forkserver),
    Kind(name="launcher", weight=4, is_kill=True, deal=Faults.kill_launcher),
    Kind(name="scheduler", weight=10, is_kill=True, deal=Faults.kill_scheduler),
    Kind(name="redis", weight=6, is_kill=True, deal=Faults.kill_redis),
    Kind(name="stack", weight=2, is_kill=True, deal=Faults.kill_stack),
    Kind(name="stack and all below", weight=2, is_kill=True, deal=Faults.cut_power),
    Kind(name="flushall", weight=4, is_kill=False, deal=Faults.flush_redis),
    Kind(name="message lost", weight=6, is_kill=False, deal=Faults.lose_message),
    Kind(name="message twice", weight=6, is_kill=False, deal=Faults.repeat_message),
    Kind(name="worker stopped past its lease", weight=4, is_kill=False, deal=Faults.stop_worker),
)
