"""The exact account of a fleet that has come to rest: what must hold of rows, files and processes."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from qbatch.core.domain import JobState
from qbatch.core.settings import Settings
from qbatch.core.storage import MANIFEST
from qbatch.models_db.database_id import database_id
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, Checkpoint, Job, Lease, Result
from qbatch.scheduler.stack_lock import stack_is_running
from qbatch.worker.checkpoints.verify import verify
from tests.acceptance.conftest import processes_of
from tests.chaos.tiny_sources import Sources

# A killed runner is taken for one that ran out of host memory: the kernel kills with the same signal.
CHARGED = ("host_oom", "worker_lost")
UNCHARGED = ("handed_back", "expired")
SOURCE_CHANGED = "source_changed"
# The attempt of an outcome that was late by a lease, and still the last, keeps the word that closed it.
_LATE = (*CHARGED, *UNCHARGED)

_ENTERED = re.compile(
    r"(?P<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) qbatch\.runner INFO (?P<jobs>j\d+(?:, j\d+)*): "
    r"(?:fetching|quantizing|publishing|loading|benchmarking|searching)"
)
_CLOCK_SLACK_S = 0.5


@dataclass(slots=True)
class Account:
    """``problems`` is empty where everything holds; ``figures`` are counts to print."""

    problems: list[str] = field(default_factory=list)
    figures: Counter[str] = field(default_factory=Counter)

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(otherwise)

    def __add__(self, other: Account) -> Account:
        return Account(self.problems + other.problems, self.figures + other.figures)


def account_of_work(
    database: Database, settings: Settings, *, others: Sequence[Database] = (), sources: Sources
) -> Account:
    """Of rows and files; the fleet is idle and need not have stopped.

    ``others`` are the databases whose checkpoints lie on the same storage. Jobs of ``sources`` that changed meanwhile
    may have met SOURCE_CHANGED, and may have failed of it.
    """
    account = Account()
    with database.read() as session:
        jobs = list(session.scalars(select(Job).order_by(Job.id)))
        attempts = list(session.scalars(select(Attempt).order_by(Attempt.job_id, Attempt.attempt)))
        results = {result.job_id: result for result in session.scalars(select(Result))}
        checkpoints = {row.key: row for row in session.scalars(select(Checkpoint))}
        logs = settings.logs_of(database_id(session))
        session.expunge_all()
    by_job: dict[int, list[Attempt]] = {job.id: [] for job in jobs}
    for attempt in attempts:
        by_job[attempt.job_id].append(attempt)
    entered = _entered(logs)
    by_id = {job.id: job for job in jobs}
    for job in jobs:
        own, may_fail = by_job[job.id], Path(job.location) in sources.changed
        _check_job(account, job, own, entered.get(job.id, []), may_fail=may_fail)
        if may_fail and job.error_kind == SOURCE_CHANGED:
            account.figures["jobs failed of a source that changed"] += 1
            continue
        _check_result(account, job, by_id, results)
        _check_place(account, job, results.get(job.id), checkpoints)
    _check_searches(account, jobs)
    _check_adapters(account, jobs, checkpoints)
    _check_checkpoints(account, settings, list(checkpoints.values()), _paths(others), sources)
    _check_leftovers(account, settings)
    account.figures += Counter({"jobs": len(jobs), "results": len(results), "attempts": len(attempts)})
    account.figures += Counter(f"attempts {attempt.outcome}" for attempt in attempts)
    return account


def _paths(databases: Sequence[Database]) -> set[str]:
    """Where the checkpoints on record lie."""
    found: set[str] = set()
    for database in databases:
        with database.read() as session:
            found.update(session.scalars(select(Checkpoint.path)))
    return found


def _check_job(
    account: Account, job: Job, attempts: Sequence[Attempt], entered: Sequence[float], *, may_fail: bool
) -> None:
    name = f"j{job.id}"
    changes = [attempt for attempt in attempts if attempt.outcome == SOURCE_CHANGED]
    is_failed_of_it = job.state == JobState.FAILED and job.error_kind == SOURCE_CHANGED
    # The first time it begins once more. A search that is over fails with the job that publishes what it found.
    failed_rightly = may_fail and is_failed_of_it and (len(changes) >= 2 or job.search_id is not None)
    account.expect(
        job.state == JobState.SUCCEEDED or failed_rightly,
        f"{name} is {job.state}: {job.error_kind} {job.error_message} ({job.stage})",
    )
    account.expect(
        [attempt.attempt for attempt in attempts] == list(range(1, job.attempt + 1)),
        f"{name} is at attempt {job.attempt}, its record has {[attempt.attempt for attempt in attempts]}",
    )
    for attempt in attempts:
        account.expect(attempt.ended_at is not None, f"{name}'s attempt {attempt.attempt} has no end")
    *earlier, last = [attempt.outcome for attempt in attempts] or [None]
    allowed = {*CHARGED, *UNCHARGED, *((SOURCE_CHANGED,) if may_fail else ())}
    account.expect(set(earlier) <= allowed, f"{name}'s attempts ended {earlier}: {[a.message for a in attempts]}")
    answered_at_once = not attempts and job.reused_from is not None
    if job.state == JobState.SUCCEEDED and not answered_at_once:
        account.expect(last in ("succeeded", *_LATE), f"{name} succeeded, its last attempt ended {last}")
        account.figures["late outcomes that counted"] += last in _LATE
    charged = [attempt for attempt in attempts if attempt.outcome in CHARGED]
    costly = len(charged) + len(changes)
    account.expect(job.failures == costly, f"{name} has {job.failures} failures, and {costly} attempts that cost one")
    for attempt in charged:
        account.expect(
            any(_within(at, attempt) for at in entered),
            f"{name}'s attempt {attempt.attempt} was charged ({attempt.outcome}), and no runner had begun on it",
        )


def _within(at: float, attempt: Attempt) -> bool:
    assert attempt.ended_at is not None
    begun, ended = attempt.claimed_at.timestamp(), attempt.ended_at.timestamp()
    return begun - _CLOCK_SLACK_S <= at <= ended + _CLOCK_SLACK_S


def _entered(logs: Path) -> dict[int, list[float]]:
    """When runners said that they began on a job or went on to its next stage, by job id."""
    found: dict[int, list[float]] = {}
    for log in logs.glob("*.log"):
        for match in _ENTERED.finditer(log.read_text(errors="replace")):
            seconds, _, milliseconds = match["at"].partition(",")
            at = time.mktime(time.strptime(seconds, "%Y-%m-%d %H:%M:%S")) + int(milliseconds) / 1000
            for name in match["jobs"].split(", "):
                found.setdefault(int(name[1:]), []).append(at)
    return found


def _check_result(account: Account, job: Job, jobs: dict[int, Job], results: dict[int, Result]) -> None:
    """One result for each job, its own or an earlier job's."""
    name, result = f"j{job.id}", results.get(job.id)
    if job.reused_from is None:
        account.expect(result is not None, f"{name} has no result")
        if result is not None:
            account.expect(
                result.attempt == job.attempt, f"{name}'s result is of attempt {result.attempt}, its last {job.attempt}"
            )
        return
    account.figures["jobs answered by another's result"] += 1
    account.expect(result is None, f"{name} is answered by j{job.reused_from}, and has a result of its own")
    other = jobs[job.reused_from]
    account.expect(
        other.id in results and other.checkpoint_key == job.checkpoint_key,
        f"{name} is answered by j{other.id}, which has no result of the same checkpoint",
    )


def _check_place(account: Account, job: Job, result: Result | None, checkpoints: dict[str, Checkpoint]) -> None:
    """A quantized job's result names a checkpoint on record; a baseline's none."""
    if result is None:
        return
    row = checkpoints.get(job.checkpoint_key or "")
    expected = row.path if row is not None else None
    account.expect(
        result.checkpoint_path == expected and (expected is None) == (job.method == "none"),
        f"j{job.id}'s result lies at {result.checkpoint_path}, its checkpoint at {expected}",
    )


def _check_adapters(account: Account, jobs: Sequence[Job], checkpoints: dict[str, Checkpoint]) -> None:
    """Each adapter lies beside the checkpoint that it belongs to, which is on record too."""
    for job in jobs:
        if job.scheme.get("recovery") is None or job.state != JobState.SUCCEEDED:
            continue
        account.figures["adapters"] += 1
        adapter, base = checkpoints.get(job.checkpoint_key or ""), checkpoints.get(job.base_key or "")
        is_beside = adapter is not None and base is not None and adapter.path.startswith(f"{base.path}+")
        account.expect(is_beside, f"j{job.id}'s adapter does not lie beside its checkpoint")


def _check_searches(account: Account, jobs: Sequence[Job]) -> None:
    """Each search has one job that publishes what it found: their bounds are met at once."""
    points = Counter(job.search_job_id for job in jobs if job.search_job_id is not None)
    for job in jobs:
        if job.search is not None:
            account.figures["searches"] += 1
            failed_before = job.state == JobState.FAILED and job.search_id is None
            account.expect(points[job.id] == (not failed_before), f"j{job.id} found what {points[job.id]} jobs publish")


def _check_checkpoints(
    account: Account, settings: Settings, rows: Sequence[Checkpoint], of_others: Collection[str], sources: Sources
) -> None:
    folders = {str(folder.relative_to(settings.storage)) for folder in settings.checkpoints.glob("*/*")}
    on_record = {row.path for row in rows}
    for path in sorted(on_record - folders):
        account.problems.append(f"{path} is on record, and is not there")
    for path in sorted(folders - on_record - set(of_others)):
        # Whoever died between publishing and recording it is done again, with the weights that are there then.
        of_former = sources.is_of_former_weights(settings.storage / path)
        account.figures["checkpoints of former weights that nobody recorded"] += of_former
        account.expect(of_former, f"{path} is there, and no job answers for it")
    for path in sorted(folders - set(of_others)):
        account.problems += [f"{path} {difference}" for difference in sources.differences(settings.storage / path)]
    for row in rows:
        if row.path in folders:
            folder = settings.storage / row.path
            account.problems += [f"{row.path}: {problem}" for problem in verify(folder)]
            root = json.loads((folder / MANIFEST).read_text())["root_sha256"]
            account.expect(root == row.root_sha256, f"{row.path} is not the one on record")
    account.figures["checkpoints that verify"] += len(on_record & folders)


def _check_leftovers(account: Account, settings: Settings) -> None:
    """Nothing half done lies on the storage, and nothing waits to be recorded."""
    for path in leftovers(settings):
        account.problems.append(f"left behind: {path}")


def leftovers(settings: Settings) -> Iterator[Path]:
    """Of attempts that were killed, until a worker's next sweep; of outcomes that wait to be recorded."""
    yield from settings.staging.glob("*/*/*-*")
    yield from (settings.storage / "base-logits").glob(".*")
    yield from settings.spool.glob("*")


def account_of_end(database: Database, settings: Settings, temporary: Path) -> Account:
    """Of processes and locks, after the fleet was told to stop; ``temporary`` was its TMPDIR."""
    account = Account()
    for process in processes_of(settings.home):
        account.problems.append(f"still running: {process.pid} {' '.join(process.cmdline())}")
    account.expect(not stack_is_running(settings), "the stack's lock is still held")
    sockets = settings.socket_dir
    link = [settings.socket_link] if settings.socket_link.is_symlink() else []
    for path in (*sockets.parent.glob(f"{sockets.name}*"), *temporary.iterdir(), *link):
        account.problems.append(f"left behind: {path}")
    with database.read() as session:
        for lease in session.scalars(select(Lease)):
            account.problems.append(f"the lease {lease.name} is still {lease.holder}'s")
    return account
