"""A fleet as the faults see it: who lives, what runs, and what is to wake again."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import redis
from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState
from qbatch.core.settings import Settings
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job, Worker
from tests.chaos.processes import Role, children_of, family_of, kill
from tests.chaos.tiny_sources import Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A job that runs now."""

    job_id: int
    stage: str
    source: Path
    worker_pid: int


@dataclass(slots=True)
class ExposedFleet:
    """What can be hurt. ``frozen`` are the processes that are stopped, and until when (monotonic); ``migrations`` those
    of later versions that its database stands at: (oldest code, body) each."""

    settings: Settings
    database: Database
    sources: Sources
    rng: random.Random
    frozen: dict[psutil.Process, float] = field(default_factory=dict)
    migrations: list[tuple[str, str]] = field(default_factory=list)
    _foreign_until: float = 0.0
    _roll_back: Callable[[], None] | None = None

    def living(self, role: Role) -> list[psutil.Process]:
        return family_of(self.settings.home)[role]

    def running(self) -> list[Running]:
        query = (
            select(Job.id, Job.stage, Job.location, Worker.pid)
            .join(Worker, Worker.id == Job.worker_id)
            .where(Job.state == JobState.RUNNING)
            .order_by(Job.id)
        )
        with self.database.read() as session:
            return [
                Running(job_id=job_id, stage=stage or "", source=Path(location), worker_pid=pid)
                for job_id, stage, location, pid in session.execute(query)
            ]

    def kill_one(self, role: Role) -> str | None:
        victims = self.living(role)
        if not victims:
            return None
        victim = self.rng.choice(victims)
        kill([victim])
        return f"pid {victim.pid}"

    def kill_family(self, role: Role) -> str | None:
        victims = self.living(role)
        if not victims:
            return None
        head = self.rng.choice(victims)
        family = [head, *children_of(head)]
        kill(family)
        return f"pid {head.pid} and {len(family) - 1} below it"

    def freeze(self, processes: Sequence[psutil.Process]) -> float:
        """SIGSTOP for longer than a lease, the seconds; ``wake`` has them go on."""
        seconds = self.settings.lease_s * self.rng.uniform(1.2, 2.5)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
                self.frozen[process] = time.monotonic() + seconds
        return seconds

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction. SQLite has one lock, and nobody else would wake who was stopped with it while this waits."""
        self.wake(all_=True)
        with self.database.write() as session:
            yield session

    def wake(self, *, all_: bool = False) -> None:
        """SIGCONT to those whose time has come."""
        for process, until in list(self.frozen.items()):
            if all_ or time.monotonic() >= until:
                del self.frozen[process]
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    @property
    def is_foreign(self) -> bool:
        """Whether the schema is one that this version's code refuses."""
        return self._roll_back is not None

    def be_foreign(self, seconds: float, roll_back: Callable[[], None]) -> None:
        """From now on, until ``roll_back`` is called by ``restore``, not before ``seconds`` have passed."""
        self._foreign_until, self._roll_back = time.monotonic() + seconds, roll_back

    def restore(self) -> None:
        """Take the foreign schema back, once its time has come."""
        if self._roll_back is not None and time.monotonic() >= self._foreign_until:
            self._roll_back()
            self._foreign_until, self._roll_back = time.monotonic(), None

    def was_foreign_within(self, seconds: float) -> bool:
        return self.is_foreign or 0.0 < self._foreign_until >= time.monotonic() - seconds

    @contextmanager
    def redis(self) -> Iterator[redis.Redis]:
        """A connection; what is asked of a Redis that is down is not done."""
        client: redis.Redis = redis.Redis.from_url(self.settings.redis_url, socket_timeout=5, decode_responses=True)
        with client, contextlib.suppress(redis.RedisError):
            yield client


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A fault as the driver draws it. ``is_kill``: it ends processes by SIGKILL, and counts towards the kills. ``deal``
    returns what it hurt, None where there was nothing to hurt."""

    name: str
    weight: int
    is_kill: bool
    deal: Callable[[ExposedFleet], str | None]
