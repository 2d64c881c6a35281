"""How long open batches and running jobs will still take, judged by what was measured."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.orm import Session

from qbatch.core.domain import OPEN_STATES, DeviceKind, JobState, find_id
from qbatch.core.job_duration import JobWork, PastRun, estimate_duration, share_of_bundle
from qbatch.models_db.batches import spec_of
from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.past_runs import past_runs, running_bundles
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import Attempt, Batch, Job, Worker
from qbatch.models_db.workers import live

# With more open batches, nobody asks when each will end; with more jobs of a batch, their mean does not change.
_MOST_BATCHES = 20
_SAMPLE = 200
# Work that has taken longer than was expected will still take some of it, and the more the later it is: that it takes
# another five seconds, said for minutes, is believed by nobody.
_LEAST_SHARE, _SHARE_OF_DELAY = 0.1, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLeft:
    """Seconds until the end of batches and of running jobs, by id. Without an entry: nothing comparable has run."""

    batches: Mapping[int, float] = field(default_factory=dict)
    jobs: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWork:
    """What is left of a batch: of each bundle that runs, the seconds; bundles that wait, and the seconds of each."""

    priority: int
    running_s: Sequence[float]
    bundles: int
    seconds_per_bundle: float


def time_left(session: Session, *, lease_s: float, runs: Sequence[PastRun] | None = None) -> TimeLeft:
    """Read what is open, and judge it. ``runs``: those of ``past_runs``, if they were read just now."""
    workers = live(session, lease_s)
    expected = _Expected(
        session,
        past_runs(session) if runs is None else runs,
        next((kind for kind in (DeviceKind.CUDA, DeviceKind.CPU) if any(w.device_kind == kind for w in workers)), None),
    )
    running = _running_bundles(session, expected)
    by_batch = _open_work(session, running, expected)
    return TimeLeft(
        batches={
            batch_id: judge(work, [other for key, other in by_batch.items() if key != batch_id and other], len(workers))
            for batch_id, work in by_batch.items()
            if work is not None and workers
        },
        jobs={job_id: one.seconds for one in running if one.seconds is not None for job_id in one.job_ids},
    )


def with_time_left(rows: Sequence[dict[str, Any]], left: TimeLeft) -> list[dict[str, Any]]:
    """Rows of ``listing``, of batches or jobs, with ``left_s``: None where it is not known, and of what has ended."""
    return [{**row, "left_s": _left_s(row, left)} for row in rows]


def _left_s(row: Mapping[str, Any], left: TimeLeft) -> float | None:
    _, number = find_id(row["job_id"] if "job_id" in row else row["batch_id"]) or ("", 0)
    seconds = (left.jobs if "job_id" in row else left.batches).get(number)
    return None if seconds is None else round(seconds, 1)


def judge(own: OpenWork, others: Sequence[OpenWork], workers: int) -> float:
    """The seconds until ``own`` has ended. Bundles go to whichever worker is free first: those of batches of a higher
    priority before, and those of the same one in turns."""
    running = [*own.running_s, *(left for other in others for left in other.running_s)]
    free = sorted(running)[-workers:] if len(running) > workers else [*running, *[0.0] * (workers - len(running))]
    heapq.heapify(free)
    for other in others:
        if other.priority >= own.priority:
            count = other.bundles if other.priority > own.priority else min(other.bundles, own.bundles)
            _assign(free, count, other.seconds_per_bundle)
    return max([*own.running_s, *_assign(free, own.bundles, own.seconds_per_bundle)], default=0.0)


def _assign(free: list[float], bundles: int, seconds: float) -> list[float]:
    """Give each bundle to the worker that is free first, and return when the last one ends, if there is one."""
    ends = [heapq.heapreplace(free, free[0] + seconds) + seconds for _ in range(bundles)]
    return ends[-1:]


class _Expected:
    """The seconds that a job will keep a device busy: from earlier runs that are like it, else as the others of its
    batch did."""

    def __init__(self, session: Session, runs: Sequence[PastRun], kind: DeviceKind | None) -> None:
        self._session = session
        self._runs = runs
        self._kind = kind
        # The estimates by what decides them, because most jobs have that in common with others.
        self._estimates: dict[tuple[DeviceKind, str, str, str, str, bool], float | None] = {}
        self._means: dict[int, float | None] = {}

    def of(self, job: Job, kind: DeviceKind | None = None) -> float | None:
        kind = kind or (DeviceKind(job.device) if job.device != DeviceKind.AUTO else self._kind)
        estimate = None if kind is None else self._estimate(job, kind)
        return estimate if estimate is not None else self._mean_of(job.batch_id)

    def _estimate(self, job: Job, kind: DeviceKind) -> float | None:
        recovery = repr(job.scheme.get("recovery"))
        key = (kind, job.location, job.method, recovery, repr(job.protocol), job.search is not None)
        if key not in self._estimates:
            estimate = estimate_duration(JobWork.of(spec_of(job), kind, None), self._runs)
            self._estimates[key] = None if estimate is None else estimate.seconds
        return self._estimates[key]

    def _mean_of(self, batch_id: int) -> float | None:
        if batch_id not in self._means:
            self._means[batch_id] = _mean_seconds(self._session, batch_id)
        return self._means[batch_id]


def _mean_seconds(session: Session, batch_id: int) -> float | None:
    """The mean time of the newest jobs of the batch that succeeded, in seconds."""
    newest = (
        select(Job.id)
        .where(Job.batch_id == batch_id, Job.state == JobState.SUCCEEDED)
        .order_by(Job.id.desc())
        .limit(_SAMPLE)
    )
    ids = session.scalars(newest).all()
    running = running_bundles(session)
    bundles: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for bundle, attempt in _attempts(session, ids):
        if attempt.ended_at is not None and bundle not in running:
            held = (attempt.claimed_at.timestamp(), attempt.ended_at.timestamp())
            bundles.setdefault((bundle, attempt.worker_id), []).append(held)
    jobs = sum(map(len, bundles.values()))
    return sum(share_of_bundle(held, 1) for held in bundles.values()) / jobs if jobs else None


def _attempts(session: Session, job_ids: Collection[int]) -> list[tuple[str, Attempt]]:
    """The newest attempt of each job that had one, with the job's bundle."""
    query = select(Job.bundle, Attempt).join(Attempt, (Attempt.job_id == Job.id) & (Attempt.attempt == Job.attempt))
    chunks = in_chunks(sorted(job_ids), 40)
    return [(bundle, one) for some in chunks for bundle, one in session.execute(query.where(Job.id.in_(some)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _RunningBundle:
    """The jobs that a worker runs now, and the seconds that they will still take."""

    batch_id: int
    job_ids: Sequence[int]
    seconds: float | None


def _running_bundles(session: Session, expected: _Expected) -> list[_RunningBundle]:
    now = session.execute(select(db_now())).scalar_one()
    rows = session.execute(
        select(Job, Attempt.claimed_at, Worker.device_kind)
        .join(Attempt, (Attempt.job_id == Job.id) & (Attempt.attempt == Job.attempt))
        .join(Worker, Worker.id == Job.worker_id)
        .where(Job.state == JobState.RUNNING)
        .order_by(Job.id)
    ).all()
    groups: dict[tuple[int | None, str], list[Row[Job, datetime, str]]] = {}
    for row in rows:
        groups.setdefault((row.Job.worker_id, row.Job.bundle), []).append(row)
    ended = _ended_of(session, {bundle for _, bundle in groups})
    return [_bundle(group, ended.get(bundle, ()), now, expected) for (_, bundle), group in groups.items()]


def _ended_of(session: Session, bundles: Collection[str]) -> dict[str, list[tuple[Job, datetime, int]]]:
    """The jobs of these bundles that have ended, with when they were claimed and by which worker."""
    found: dict[str, list[tuple[Job, datetime, int]]] = {}
    query = (
        select(Job, Attempt.claimed_at, Attempt.worker_id)
        .join(Attempt, (Attempt.job_id == Job.id) & (Attempt.attempt == Job.attempt))
        # Without a condition on the state, because SQLite would then read all jobs that ever ended.
        .where(Job.finished_at.is_not(None))
    )
    for some in in_chunks(sorted(bundles), 40):
        for job, claimed_at, worker_id in session.execute(query.where(Job.bundle.in_(some))):
            found.setdefault(job.bundle, []).append((job, claimed_at, worker_id))
    return found


def _bundle(
    rows: Sequence[Row[Job, datetime, str]],
    ended: Sequence[tuple[Job, datetime, int]],
    now: datetime,
    expected: _Expected,
) -> _RunningBundle:
    """``ended``: the others of the same bundle, of which those count that were claimed together with ``rows``."""
    first = rows[0]
    kind = DeviceKind(first.device_kind)
    together = [
        job
        for job, claimed_at, worker_id in ended
        if worker_id == first.Job.worker_id and abs((claimed_at - first.claimed_at).total_seconds()) < SLACK_S
    ]
    open_s = [expected.of(row.Job, kind) for row in rows]
    all_s = [*open_s, *(expected.of(job, kind) for job in together)]
    elapsed_s = (now - first.claimed_at).total_seconds()
    seconds = None
    if None not in all_s:
        left_s = sum(one or 0.0 for one in all_s) - elapsed_s
        least_s = _LEAST_SHARE * sum(one or 0.0 for one in open_s)
        seconds = max(left_s, least_s + _SHARE_OF_DELAY * max(-left_s, 0.0))
    return _RunningBundle(batch_id=first.Job.batch_id, job_ids=[row.Job.id for row in rows], seconds=seconds)


def open_batches(session: Session) -> list[int]:
    """The batches with jobs that have not ended, the oldest first."""
    # One query for each state, because a query for both would read the whole index.
    found: set[int] = set()
    for state in OPEN_STATES:
        found.update(session.scalars(select(Job.batch_id).where(Job.state == state).distinct()))
    return sorted(found)


def _open_work(session: Session, running: Sequence[_RunningBundle], expected: _Expected) -> dict[int, OpenWork | None]:
    """What is left of each open batch, by its id. None if the time of a part of it cannot be estimated."""
    found: dict[int, OpenWork | None] = {}
    for batch_id in open_batches(session)[:_MOST_BATCHES]:
        left = [one.seconds for one in running if one.batch_id == batch_id]
        waiting = _waiting(session, batch_id, expected)
        if waiting is None or None in left:
            found[batch_id] = None
            continue
        bundles, seconds = waiting
        found[batch_id] = OpenWork(
            priority=session.get_one(Batch, batch_id).priority,
            running_s=[one for one in left if one is not None],
            bundles=bundles,
            seconds_per_bundle=seconds,
        )
    return found


def _waiting(session: Session, batch_id: int, expected: _Expected) -> tuple[int, float] | None:
    """(bundles that wait, the mean seconds of one), judged by the first of them; None if that cannot be judged."""
    queued = (Job.batch_id == batch_id, Job.state == JobState.QUEUED, Job.search_id.is_(None))
    sample = session.scalars(select(Job).where(*queued).order_by(Job.id).limit(_SAMPLE)).all()
    if not sample:
        return 0, 0.0
    seconds = [one for one in (expected.of(job) for job in sample) if one is not None]
    if not seconds:
        return None
    count = session.execute(select(func.count()).select_from(Job).where(*queued)).scalar_one()
    per_bundle = len(sample) / len({job.bundle for job in sample})
    return max(1, round(count / per_bundle)), per_bundle * sum(seconds) / len(seconds)
