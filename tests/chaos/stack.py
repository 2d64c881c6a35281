"""One stack under random faults: started, given batches, disturbed, left to finish, and checked."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import func, select

from qbatch.core.domain import ENDED_STATES, Method
from qbatch.core.errors import BrokerUnreachable, ForeignSchema
from qbatch.core.recovery import Recovery, RecoveryKind
from qbatch.core.search.bound import Bound
from qbatch.core.settings import Settings
from qbatch.core.sources import parse_source
from qbatch.models_db import workers
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.submit import Submission, send_now, submit
from tests.acceptance.conftest import processes_of
from tests.chaos.account import Account, account_of_end, account_of_work, leftovers
from tests.chaos.faults import CHANGING_SOURCES, KINDS, ExposedFleet, Kind
from tests.chaos.processes import kill
from tests.chaos.tiny_sources import Sources, is_encoder

_ROOT = Path(__file__).resolve().parents[2]
# The share of batches beside which there is one with a search, and after how many there is one with an adapter.
_SEARCHES, _ADAPTER_EACH = 0.3, 3
_TEXT = "It was a quiet evening, and nobody had come. " * 8
_START_S = 180.0
_STOP_S = 90.0
_END_S = 60.0
_LEAVE_S = 60.0
# ``verify`` quiets the libraries that it loads, which is not for several threads.
_ACCOUNTS = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """What one stack goes through. ``gap_s`` is the mean time between faults; ``deadline`` (monotonic) ends the kills
    early. With fewer ``models``, four at least, more of the jobs are duplicates of others. ``storage`` None is the
    stack's own; ``changes_sources``: weights are rewritten while jobs read them."""

    seed: str
    kills: int
    jobs: int
    models: int
    workers: int
    lease_s: float
    gap_s: float
    settle_s: float
    deadline: float
    threads: int
    database_url: str | None = None
    storage: Path | None = None
    changes_sources: bool = False


@dataclass(slots=True)
class StackOutcome:
    """How a stack went."""

    account: Account
    faults: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    ended_under_fire: int = 0
    batches: int = 0
    wall_s: float = 0.0


class ChaosStack:
    """``qbatch up``, a second scheduler, further launchers, and everything that happens to them. Use once."""

    def __init__(
        self, folder: Path, plan: ChaosPlan, sources: Sources, together: threading.Barrier, say: Callable[[str], None]
    ) -> None:
        """``together`` is waited at before the account, by those whose files lie in one place."""
        self._plan = plan
        self._say = say
        self._sources = sources
        self._together = together
        self._rng = random.Random(plan.seed)
        self._made: list[Path] = []
        self._temporary = folder / "tmp"
        self._temporary.mkdir(parents=True)
        self._logs = folder / "output"
        self._logs.mkdir()
        self._environ = self._environment(folder)
        self._settings = Settings.from_env(self._environ)
        self._settings.home.mkdir()
        self._database = Database(self._settings.sqlalchemy_url)
        upgrade(self._database)
        self._fleet = ExposedFleet(settings=self._settings, database=self._database, sources=sources, rng=self._rng)
        self._kinds = (*KINDS, *(CHANGING_SOURCES if plan.changes_sources else ()))
        self._members: dict[str, subprocess.Popen[bytes]] = {}
        self._outcome = StackOutcome(account=Account())
        self._begun = time.monotonic()
        self._calm_kills = 0
        self._halted = threading.Event()

    @property
    def home(self) -> Path:
        return self._settings.home

    def halt(self) -> None:
        """From another thread: break off."""
        self._halted.set()
        self._together.abort()

    @property
    def database(self) -> Database:
        return self._database

    def run(self, others: Sequence[Database] = ()) -> StackOutcome:
        """Everything, to the end of its last process; what does not hold is in the account.

        ``others`` are the databases of those who share its storage.
        """
        try:
            self._tend()
            self._wait(lambda: self._live() > 0, _START_S, "no worker is live")
            self._strike_on()
            self._settle()
            self._together.wait(self._plan.settle_s)
            with _ACCOUNTS:
                self._outcome.account += account_of_work(
                    self._database, self._settings, others=others, sources=self._sources
                )
            self._stop()
            self._outcome.account += account_of_end(self._database, self._settings, self._temporary)
        finally:
            self._fleet.wake(all_=True)
            kill(processes_of(self.home))
            for process in self._members.values():
                process.wait()
            self._database.dispose()
        self._outcome.wall_s = time.monotonic() - self._begun
        return self._outcome

    # ------------------------------------------------------------------------------------------------- the fleet

    def _environment(self, folder: Path) -> dict[str, str]:
        plan = self._plan
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("QBATCH_")}
        own = {
            "QBATCH_HOME": str(folder / "home"),
            "QBATCH_LEASE_S": str(plan.lease_s),
            "QBATCH_HEARTBEAT_S": str(plan.lease_s / 4),
            "QBATCH_SCAN_S": "1",
            # A kill charges the job that was worked on: without this the run would show that three failures end it.
            "QBATCH_MAX_FAILURES": "1000",
            # Doubled with each failure.
            "QBATCH_BACKOFF_S": "0.001",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(plan.threads),
            "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "TMPDIR": str(self._temporary),
        }
        if plan.storage is not None:
            own["QBATCH_STORAGE"] = str(plan.storage)
        if plan.database_url is not None:
            own["QBATCH_DATABASE_URL"] = plan.database_url
        return inherited | own

    def _services(self) -> dict[str, list[str]]:
        more = {f"worker-{number}": ["worker", "--cpu"] for number in range(2, self._plan.workers + 1)}
        return {"up": ["up", "--cpu"], "scheduler-2": ["scheduler"], **more}

    def _tend(self) -> None:
        """Start what is not running, as a service manager would, and wake who was stopped for long enough."""
        if self._halted.is_set():
            raise RuntimeError("another stack broke off, or the user did")
        self._fleet.wake()
        self._fleet.restore()
        for name, arguments in self._services().items():
            process = self._members.get(name)
            if process is not None and process.poll() is None:
                continue
            if process is not None:
                code = process.returncode
                # Who meets a foreign schema leaves once what it runs has ended.
                refused = code == ForeignSchema.exit_code and self._fleet.was_foreign_within(_LEAVE_S)
                self._outcome.account.expect(
                    code == -signal.SIGKILL or refused, f"{name} ended by itself, with code {code}"
                )
            with (self._logs / f"{name}.log").open("ab") as output:
                self._members[name] = subprocess.Popen(
                    [sys.executable, "-P", "-m", "qbatch", *arguments],
                    env=self._environ,
                    cwd=self._temporary,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # A Ctrl-C is the driver's to act on.
                    start_new_session=True,
                )

    def _stop(self) -> None:
        """SIGTERM, the stack last: its Redis is the others' too."""
        for name in sorted(self._members, key="up".__eq__):
            self._members[name].terminate()
            try:
                code = self._members[name].wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._outcome.account.problems.append(f"{name} did not stop within {_STOP_S:g} s of SIGTERM")
                continue
            self._outcome.account.expect(code == 0, f"{name} stopped with code {code}")
        deadline = time.monotonic() + _END_S
        while processes_of(self.home) and time.monotonic() < deadline:
            time.sleep(0.2)

    # -------------------------------------------------------------------------------------------------- the work

    def _feed(self) -> None:
        """Submit until enough jobs are there, and enough of them open to keep every worker busy."""
        while self._count() < self._plan.jobs or self._count(open_=True) < 6 * self._plan.workers:
            self._submit()

    def _submit(self) -> None:
        """A batch of four models at both widths and their baselines; some were in earlier batches already."""
        new = [self._next() for _ in range(min(self._rng.choice((1, 2, 3)) if self._made else 4, self._unmade()))]
        old = self._rng.sample(self._made[: len(self._made) - len(new)], 4 - len(new))
        grid = Grid(
            bits=(4, 8),
            quant_types=(self._rng.choice((Method.NF4, Method.NF4, Method.FP4)),),
            options={"double_quant": self._rng.random() < 0.25},
        )
        submission = Submission(
            sources=tuple(parse_source(str(folder)) for folder in [*new, *old]),
            grid=grid,
            eval_text=_TEXT,
            priority=self._rng.choice((0, 0, 0, 5)),
        )
        self._store(submission)
        if self._outcome.batches % _ADAPTER_EACH == 0:
            self._recover()
        if self._rng.random() < _SEARCHES:
            self._search()

    def _search(self) -> None:
        """A batch that looks for the layers of one of its models to keep at 16 bits. An encoder has no such search."""
        folder = self._rng.choice([folder for folder in self._made if not is_encoder(folder)])
        grid = Grid(bound=Bound(max_weights_bytes=10**9))
        source = parse_source(str(folder))
        self._store(Submission(sources=(source,), grid=grid, eval_text=_TEXT, search_text=_TEXT))

    def _recover(self) -> None:
        """A batch that makes an adapter of the newest model, and the checkpoint that it belongs to. Only sizes are
        measured: PEFT takes seconds to import."""
        recovery = Recovery.of(RecoveryKind.SVD, 2, "")
        sizes = {"quality": False, "speed": False, "why": False, "energy": False}
        grid = Grid(bits=(4,), baseline=False, recoveries=(recovery,), **sizes)
        source = parse_source(str(self._made[-1]))
        self._store(Submission(sources=(source,), grid=grid, eval_text=_TEXT))

    def _store(self, submission: Submission) -> None:
        # Nobody else would wake who was stopped with SQLite's lock, while this waits for it.
        self._fleet.wake(all_=True)
        receipt = submit(self._database, self._settings, submission)
        self._outcome.batches += 1
        self._say(f"b{receipt.batch_id}: {receipt.jobs} jobs, {receipt.answered} answered by earlier results")
        # The scheduler sends them, once there is a Redis again.
        with contextlib.suppress(BrokerUnreachable):
            send_now(self._database, self._settings)

    def _unmade(self) -> int:
        return self._plan.models - len(self._made)

    def _next(self) -> Path:
        self._made.append(self._sources.model(len(self._made)))
        return self._made[-1]

    def _count(self, *, open_: bool = False) -> int:
        query = select(func.count()).select_from(Job)
        if open_:
            query = query.where(Job.state.not_in(ENDED_STATES))
        with self._database.read() as session:
            return session.execute(query).scalar_one()

    def _ended(self) -> int:
        return self._count() - self._count(open_=True)

    def _live(self) -> int:
        with self._database.read() as session:
            return len(workers.live(session, self._settings.lease_s))

    # ------------------------------------------------------------------------------------------------- the faults

    def _strike_on(self) -> None:
        """Faults until the kills are reached, or the time is up. Between two, jobs get a chance to end."""
        seen = self._ended()
        while self._outcome.kills < self._plan.kills and time.monotonic() < self._plan.deadline:
            self._tend()
            self._feed()
            self._pause(self._rng.uniform(0.2, 1.8) * self._plan.gap_s)
            seen = self._give_a_chance(seen)
            self._strike(self._rng.choices(self._kinds, [kind.weight for kind in self._kinds])[0])
        self._outcome.ended_under_fire = self._ended()

    def _strike(self, kind: Kind) -> None:
        hurt = kind.deal(self._fleet)
        if hurt is None:
            return
        self._outcome.faults[kind.name] += 1
        self._outcome.kills += kind.is_kill
        self._calm_kills += kind.is_kill
        number = f"kill {self._outcome.kills}" if kind.is_kill else "fault"
        self._say(f"{number}: {kind.name}: {hurt}")

    def _give_a_chance(self, seen: int) -> int:
        """After some kills in which no job ended, wait for one: a fleet that never gets to the end shows nothing."""
        ended = self._ended()
        if ended == seen and self._calm_kills >= 2 + self._plan.workers:
            self._say(f"no job ended in {self._calm_kills} kills; holding fire")
            self._wait(lambda: self._ended() > seen, _START_S, "no job ended while nothing was killed")
            ended = self._ended()
        if ended > seen:
            self._calm_kills = 0
        return ended

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._tend()
            time.sleep(min(0.1, max(until - time.monotonic(), 0.0)))

    def _settle(self) -> None:
        """Hold fire until every job has ended, every worker is back, and they have swept."""
        self._say(f"{self._outcome.kills} kills; {self._count(open_=True)} jobs are open; settling")
        self._wait(lambda: not self._fleet.frozen, _START_S, "not every stopped process went on")
        self._wait(lambda: not self._fleet.is_foreign, _START_S, "the foreign schema was not taken back")
        self._wait(lambda: self._count(open_=True) == 0, self._plan.settle_s, "not every job ended")
        self._wait(lambda: self._live() >= self._plan.workers, _START_S, "not every worker came back")
        self._wait(lambda: not any(leftovers(self._settings)), _START_S, "not everything was swept")

    def _wait(self, condition: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self._tend()
            if time.monotonic() > deadline:
                self._outcome.account.problems.append(f"{otherwise} within {timeout_s:g} s")
                self._say(otherwise)
                return
            time.sleep(0.2)
