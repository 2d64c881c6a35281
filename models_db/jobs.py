"""The job state machine. The only writer of a job's state.

    queued → running → succeeded | failed | cancelled

``attempt`` rises at every claim and fences out whoever held the job before. ``failures`` rises only when an attempt
whose own work had started is lost or fails.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, case, false, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from qbatch.core.domain import (
    ENDED_STATES,
    Claim,
    DeviceKind,
    JobState,
    Method,
    Protocol,
    Stage,
    format_job_id,
)
from qbatch.core.errors import (
    CudaOom,
    DeviceError,
    DiskFull,
    InternalError,
    JobError,
    Retry,
    SourceChanged,
    StorageError,
    WorkerLost,
    job_error,
)
from qbatch.core.measured.measurement import MEASURED_COLUMNS, Measurement
from qbatch.models_db import pauses
from qbatch.models_db.batches import spec_of
from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.tables import Attempt, Job, Result, Worker
from qbatch.models_db.vram import may_run_in, ran_out, show_need, usable_bytes
from qbatch.models_db.window import own_bundle
from qbatch.models_db.workers import around, is_live

Token = tuple[int, int]
"""(job_id, attempt): what a worker must show to change a job."""

_NO_SYNC = {"synchronize_session": False}
# Where many failures are allowed, doubling would soon be days.
_LONGEST_BACKOFF_S = 3600.0
# How an attempt ends that says nothing of whether the next one will: a full disk that cut it short is told apart.
_BLAMELESS = frozenset({"handed_back", "expired", DeviceError.kind, DiskFull.kind})
_UNDISPATCHED: dict[str, Any] = {"dispatch_id": None, "queue": None, "missed_scans": 0}


def claim(session: Session, job_ids: Sequence[int], worker_id: int, lease_s: float) -> list[Claim]:
    """Take those of ``job_ids`` that are queued and due, baseline first. Of two claimants one gets each job.

    A job that failed on this worker is left to another one for a lease, where another of its kind is live. A job that
    ran out of a GPU's memory is left to those of a larger class for good.
    """
    may_have = _may_have(session, worker_id, lease_s)
    free = _lock(session, Job.id.in_(job_ids), Job.state == JobState.QUEUED, _is_due(), may_have)
    session.execute(
        update(Job)
        .where(Job.id.in_(free))
        .values(
            state=JobState.RUNNING,
            stage=Stage.FETCHING,
            attempt=Job.attempt + 1,
            work_started=False,
            progress=None,
            worker_id=worker_id,
            lease_expires_at=db_now(lease_s),
            started_at=func.coalesce(Job.started_at, db_now()),
            **_UNDISPATCHED,
        ),
        execution_options=_NO_SYNC,
    )
    taken = session.scalars(
        select(Job).where(Job.id.in_(free)).order_by(Job.bits.desc(), Job.id),
        execution_options={"populate_existing": True},
    ).all()
    session.add_all(Attempt(job_id=job.id, attempt=job.attempt, worker_id=worker_id) for job in taken)
    return [
        Claim(job_id=job.id, attempt=job.attempt, spec=spec_of(job), time_limit_s=job.time_limit_s) for job in taken
    ]


def _lock(session: Session, *conditions: ColumnElement[bool]) -> Sequence[int]:
    """The ids of these rows, locked in one order whoever locks: in two orders, PostgreSQL would end one of two."""
    return session.scalars(select(Job.id).where(*conditions).order_by(Job.id).with_for_update()).all()


def _is_due() -> ColumnElement[bool]:
    return or_(Job.not_before.is_(None), Job.not_before <= db_now())


def _may_have(session: Session, worker_id: int, lease_s: float) -> ColumnElement[bool]:
    worker = session.get_one(Worker, worker_id, populate_existing=True)
    if worker.state == "quarantined":
        return false()
    another = select(Worker.id).where(
        is_live(lease_s),
        Worker.id != worker_id,
        Worker.device_kind == worker.device_kind,
        or_(Job.above_memory_bytes.is_(None), Job.above_memory_bytes < Worker.memory_bytes),
    )
    # Not for longer: the others may be busy for hours.
    has_waited = Job.not_before <= db_now(-lease_s)
    return and_(
        Job.device.in_((DeviceKind.AUTO, worker.device_kind)),
        may_run_in(usable_bytes(worker)),
        or_(
            Job.avoid_worker_id.is_(None),
            Job.avoid_worker_id != worker_id,
            ~another.correlate(Job).exists(),
            has_waited,
        ),
    )


def heartbeat(session: Session, tokens: Iterable[Token], lease_s: float) -> frozenset[int]:
    """Renew the leases of ``tokens``; the job ids still held. A job that is not among them is no longer ours."""
    held = _lock(session, _holds(tokens))
    session.execute(
        update(Job).where(Job.id.in_(held)).values(lease_expires_at=db_now(lease_s)), execution_options=_NO_SYNC
    )
    return frozenset(held)


def held(session: Session, tokens: Iterable[Token]) -> frozenset[int]:
    """Which of ``tokens`` still hold their job; a cheap look between heartbeats."""
    return frozenset(session.scalars(select(Job.id).where(_holds(tokens))))


def _holds(tokens: Iterable[Token]) -> ColumnElement[bool]:
    each = [and_(Job.id == job_id, Job.attempt == attempt) for job_id, attempt in tokens]
    return and_(Job.state == JobState.RUNNING, or_(*each)) if each else Job.id.is_(None)


def note(
    session: Session,
    token: Token,
    *,
    stage: Stage | None = None,
    work_started: bool | None = None,
    progress: Mapping[str, Any] | None = None,
    checkpoint_key: str | None = None,
) -> None:
    """Record how far a running attempt is; without effect once the attempt is stale."""
    values: dict[str, Any] = {}
    if stage is not None:
        values["stage"] = stage
    if work_started is not None:
        values["work_started"] = work_started
    if progress is not None:
        values["progress"] = dict(progress)
    if checkpoint_key is not None:
        values["checkpoint_key"] = checkpoint_key
    session.execute(update(Job).where(_holds([token])).values(**values), execution_options=_NO_SYNC)


def succeed(
    session: Session,
    token: Token,
    measurement: Measurement,
    *,
    protocol: Protocol,
    checkpoint_path: str | None,
) -> bool:
    """Record a result. True where it counts: no newer attempt was claimed, and the job had not ended, unless it was
    given up because nothing was heard of this very attempt, or its outcome could not be recorded."""
    job = _open_to_success(session, token)
    if job is None:
        return False
    # Where the database was away when the key was to be noted, the row may have an earlier content's.
    job.checkpoint_key = measurement.details.checkpoint_key or job.checkpoint_key
    session.add(
        Result(
            job_id=job.id,
            attempt=job.attempt,
            checkpoint_path=checkpoint_path,
            protocol=protocol.to_json(),
            protocol_hash=protocol.hash,
            **{name: getattr(measurement, name) for name in MEASURED_COLUMNS},
            details=measurement.details.to_json(),
        )
    )
    _end(session, job, JobState.SUCCEEDED)
    _reset_device_errors(session, job.worker_id)
    return True


def answer(session: Session, token: Token, reused_from: int) -> bool:
    """End a job with the result of an earlier one, as ``succeed`` does with a new one."""
    job = _open_to_success(session, token)
    if job is None:
        return False
    job.reused_from = reused_from
    _end(session, job, JobState.SUCCEEDED)
    return True


def fail(
    session: Session, token: Token, error: JobError, *, backoff_s: float, max_failures: int, lease_s: float
) -> bool:
    """Apply the error's policy to a running attempt: fail the job, or queue it again. False for a stale token."""
    job = _locked(session, token, JobState.RUNNING)
    if job is None:
        return False
    if error.retry is Retry.LARGER_CLASS:
        _move_up(session, job, error, lease_s)
    else:
        _apply(session, job, error, backoff_s=backoff_s, max_failures=max_failures)
    return True


def _move_up(session: Session, job: Job, error: JobError, lease_s: float) -> None:
    """Queue the job for a larger VRAM class, uncharged; it fails where no worker around is of one. The row
    remembers."""
    worker = session.get_one(Worker, job.worker_id)
    # The claim saw to it that this is more than was seen before; a prediction gives way to what is seen.
    job.above_memory_bytes = worker.memory_bytes
    if not any(usable_bytes(other) > worker.memory_bytes for other, _ in around(session, lease_s)):
        _end(session, job, JobState.FAILED, _too_large(worker.memory_bytes, f"{error}; it "))
        return
    job.error_kind = error.kind
    job.error_message = _text(error)
    _requeue(session, job, outcome=error.kind, alone=True, error=error)


def _too_large(above_bytes: int, said: str = "") -> CudaOom:
    return CudaOom(f"{said}{show_need(above_bytes)}, and no live worker has one")


def give_up_too_large(session: Session, lease_s: float) -> list[int]:
    """Fail the queued jobs that ran out of memory on a GPU, where no larger one was heard of within two leases.

    Without any GPU worker they wait, as all jobs do.
    """
    rooms = [usable_bytes(worker) for worker, _ in around(session, lease_s) if worker.device_kind == DeviceKind.CUDA]
    if not rooms:
        return []
    too_large = and_(Job.state == JobState.QUEUED, Job.above_memory_bytes >= max(rooms), ran_out())
    found = session.scalars(
        select(Job).where(too_large).order_by(Job.id).with_for_update(skip_locked=True, of=Job)
    ).all()
    for job in found:
        _end(session, job, JobState.FAILED, _too_large(job.above_memory_bytes or 0))
    return [job.id for job in found]


def any_waits_for_space(session: Session) -> bool:
    """Whether a queued job goes on as soon as the storage has room."""
    # Without a time: one that found its source cache full has one.
    waits = and_(Job.state == JobState.QUEUED, Job.error_kind == DiskFull.kind, Job.not_before.is_(None))
    return session.scalars(select(Job.id).where(waits).limit(1)).first() is not None


def keys_being_written(session: Session, keys: Collection[str], *, but_by: Collection[int]) -> set[str]:
    """Those of the checkpoint keys that running jobs, other than ``but_by``, want."""
    wanted = select(Job.checkpoint_key).where(
        Job.checkpoint_key.in_(keys),
        Job.state == JobState.RUNNING,
        Job.method != Method.NONE,
        Job.id.not_in(but_by),
    )
    return {key for key in session.scalars(wanted) if key is not None}


def hand_back(session: Session, tokens: Iterable[Token], *, alone: bool = False) -> None:
    """Queue running attempts again, uncharged; ``alone`` sends each job in a message of its own."""
    for token in sorted(tokens):
        job = _locked(session, token, JobState.RUNNING)
        if job is not None:
            _requeue(session, job, outcome="handed_back", alone=alone)


def expire(session: Session, *, backoff_s: float, max_failures: int, worker_id: int | None = None) -> list[int]:
    """Take back the jobs whose lease ran out, or all those of a worker that is dead for certain.

    Only work that had started is charged.
    """
    gone = Job.lease_expires_at < db_now() if worker_id is None else Job.worker_id == worker_id
    lost = session.scalars(
        select(Job).where(Job.state == JobState.RUNNING, gone).order_by(Job.id).with_for_update(skip_locked=True)
    ).all()
    for job in lost:
        if job.work_started:
            error = WorkerLost(f"worker {job.worker_id} died, or was silent for longer than its lease")
            _apply(session, job, error, backoff_s=backoff_s, max_failures=max_failures)
        else:
            _requeue(session, job, outcome="expired", alone=True)
    return [job.id for job in lost]


def mend_times(session: Session, *, lease_s: float, backoff_s: float, max_failures: int) -> int:
    """Cut what ends later than anything that is given now, since the database's clock was set back: leases whose worker
    is not there to renew them, and backoffs. How many there were."""
    heard_of = and_(Worker.heartbeat_at >= db_now(-lease_s), Worker.heartbeat_at <= db_now(SLACK_S))
    abandoned = and_(
        Job.state == JobState.RUNNING,
        Job.lease_expires_at > db_now(lease_s + SLACK_S),
        # One that lives renews it, and may have been set to longer leases.
        Job.worker_id.not_in(select(Worker.id).where(heard_of)),
    )
    count = _cut(session, abandoned, Job.lease_expires_at, lease_s)
    waits = and_(Job.state == JobState.QUEUED, Job.not_before > db_now(backoff_s + SLACK_S))
    # A full disk's attempts double the wait too, without being charged.
    uncharged = case((Job.error_kind == DiskFull.kind, max_failures), else_=0)
    for failures, others in session.execute(select(Job.failures, uncharged).where(waits).distinct()).all():
        longest_s = backoff_after(max(failures, others), backoff_s)
        alike = and_(waits, Job.failures == failures, uncharged == others)
        too_long = and_(alike, Job.not_before > db_now(longest_s + SLACK_S))
        count += _cut(session, too_long, Job.not_before, longest_s)
    return count


def _cut(session: Session, which: ColumnElement[bool], column: Any, to_s: float) -> int:
    query = select(Job.id).where(which).order_by(Job.id).with_for_update(skip_locked=True, of=Job)
    ids = session.scalars(query).all()
    for job_id in ids:
        session.execute(update(Job).where(Job.id == job_id).values({column: db_now(to_s)}), execution_options=_NO_SYNC)
    return len(ids)


def backoff_after(failures: int, backoff_s: float) -> float:
    """How long a job waits after so many failures; nothing has it wait for longer."""
    doublings = min(max(failures - 1, 0), 64)  # a float holds no more than a thousand of them
    return min(backoff_s * 2.0**doublings, max(backoff_s, _LONGEST_BACKOFF_S))


def cancel(session: Session, *, batch_ids: Sequence[int] = (), job_ids: Sequence[int] = ()) -> list[int]:
    """Cancel what has not ended. A running job's worker notices that it lost the job and kills the runner."""
    open_ = and_(_named(batch_ids, job_ids), Job.state.not_in(ENDED_STATES))
    _lock(session, open_)
    session.execute(
        update(Attempt)
        .where(Attempt.job_id.in_(select(Job.id).where(open_)), Attempt.ended_at.is_(None))
        .values(ended_at=db_now(), outcome=JobState.CANCELLED),
        execution_options=_NO_SYNC,
    )
    # Not by a list of ids: a batch may hold more jobs than a statement may hold parameters.
    rows = session.execute(
        update(Job)
        .where(open_)
        .values(
            state=JobState.CANCELLED,
            error_kind=None,
            error_message=None,
            lease_expires_at=None,
            finished_at=db_now(),
            **_UNDISPATCHED,
        )
        .returning(Job.id),
        execution_options=_NO_SYNC,
    ).scalars()
    return sorted(rows)


def retry(session: Session, *, batch_ids: Sequence[int] = (), job_ids: Sequence[int] = ()) -> list[int]:
    """Queue failed and cancelled jobs again with a clean slate; the attempt goes on counting, and the memory that was
    too small stays on record."""
    over = and_(_named(batch_ids, job_ids), Job.state.in_((JobState.FAILED, JobState.CANCELLED)))
    _lock(session, over)
    rows = session.execute(
        update(Job)
        .where(over)
        .values(
            state=JobState.QUEUED,
            stage=None,
            failures=0,
            forgiven_attempt=Job.attempt,
            error_kind=None,
            error_message=None,
            finished_at=None,
            not_before=None,
            avoid_worker_id=None,
            progress=None,
            **_UNDISPATCHED,
        )
        .returning(Job.id),
        execution_options=_NO_SYNC,
    ).scalars()
    return sorted(rows)


def _named(batch_ids: Sequence[int], job_ids: Sequence[int]) -> ColumnElement[bool]:
    return or_(Job.batch_id.in_(batch_ids), Job.id.in_(job_ids))


def _locked(session: Session, token: Token, *states: JobState) -> Job | None:
    job_id, attempt = token
    return session.scalars(
        select(Job).where(Job.id == job_id, Job.attempt == attempt, Job.state.in_(states)).with_for_update(),
        execution_options={"populate_existing": True},
    ).one_or_none()


def _open_to_success(session: Session, token: Token) -> Job | None:
    job = _locked(session, token, JobState.RUNNING, JobState.QUEUED, JobState.FAILED)
    given_up = job is not None and job.state == JobState.FAILED
    # For want of its outcome: nothing was heard, or what was heard could not be recorded and was set aside.
    return None if job is None or (given_up and job.error_kind not in (WorkerLost.kind, InternalError.kind)) else job


def _end(
    session: Session,
    job: Job,
    state: JobState,
    error: JobError | None = None,
    *,
    attempt_error: JobError | None = None,
) -> None:
    """``attempt_error``: what ended the attempt, where the job's own ``error`` says more."""
    _close_attempt(session, job, error.kind if error else state.value, attempt_error or error)
    job.state = state
    job.error_kind = error.kind if error else None
    job.error_message = _text(error)
    job.lease_expires_at = None
    job.finished_at = db_now()
    job.dispatch_id = None
    job.queue = None
    session.flush()


def _apply(session: Session, job: Job, error: JobError, *, backoff_s: float, max_failures: int) -> None:
    charged = error.retry in (Retry.BACKOFF, Retry.ONCE)
    job.failures += charged
    cut_short = _cut_short(session, job, error)
    if _is_final(session, job, error, max_failures) or len(cut_short) >= max_failures:
        _end(session, job, JobState.FAILED, _with_history(error, cut_short), attempt_error=error)
        return
    if error.retry is Retry.ELSEWHERE:
        _blame_device(session, job, error)
    # Doubling, so that what is broken for a minute does not use up every attempt in that minute.
    delay_s = backoff_after(max(job.failures, len(cut_short)), backoff_s)
    # The source cache is one machine's; the storage is everybody's, and any worker may try again once it has room.
    waits_for_room = isinstance(error, DiskFull) and job.stage != Stage.FETCHING
    if waits_for_room:
        _pause_for_room(session, job, error, delay_s)
    job.not_before = None if waits_for_room else db_now(delay_s)
    job.avoid_worker_id = None if waits_for_room else job.worker_id
    job.error_kind = error.kind
    job.error_message = _text(error)
    # It was not the job's doing that its source changed, and its bundle is to be measured together.
    _requeue(session, job, outcome=error.kind, alone=not isinstance(error, SourceChanged), error=error)


def _is_cut_short(job: Job, error: JobError | None) -> bool:
    """Whether storage failed the attempt in the middle of its own work. To wait for room that is known to be missing is
    no such failure."""
    if isinstance(error, DiskFull):
        return job.work_started and error.needed_bytes is None
    return job.work_started and isinstance(error, StorageError)


def _cut_short(session: Session, job: Job, error: JobError) -> list[int]:
    """The job's latest attempts that storage cut short in this one way, the last first, this one among them.

    Those that came back without a fault of their own, or waited for room, are passed over.
    """
    if not _is_cut_short(job, error):
        return []
    found = [job.attempt]
    earlier = select(Attempt).where(
        Attempt.job_id == job.id, Attempt.attempt < job.attempt, Attempt.attempt > job.forgiven_attempt
    )
    for attempt in session.scalars(earlier.order_by(Attempt.attempt.desc())):
        if attempt.cut_short and attempt.outcome == error.kind:
            found.append(attempt.attempt)
        elif attempt.cut_short or attempt.outcome not in _BLAMELESS:
            break
    return found


def _with_history(error: JobError, cut_short: Sequence[int]) -> JobError:
    """The error that ends a job, with the attempts that ended so in a row, where there were several."""
    if len(cut_short) < 2:
        return error
    *others, last = (str(attempt) for attempt in reversed(cut_short))
    return job_error(error.kind, f"{error}; attempts {', '.join(others)} and {last} in a row ended so")


def _pause_for_room(session: Session, job: Job, error: JobError, for_s: float) -> None:
    needed_bytes = error.needed_bytes if isinstance(error, DiskFull) else None
    message = f"{format_job_id(job.id)}: {_text(error)}"
    pauses.pause(session, pauses.STORAGE_FULL, message, needed_bytes=needed_bytes, for_s=for_s)


def _is_final(session: Session, job: Job, error: JobError, max_failures: int) -> bool:
    if error.retry is Retry.NEVER:
        return True
    # The row still says what sent the job back last; a retry by the user wiped it.
    if error.retry is Retry.ONCE and job.error_kind == error.kind:
        return True
    if error.retry is Retry.ELSEWHERE:
        # So many devices are not all sick: the job is, and must not quarantine the fleet.
        earlier = select(func.count()).where(
            Attempt.job_id == job.id, Attempt.outcome == error.kind, Attempt.attempt > job.forgiven_attempt
        )
        return session.execute(earlier).scalar_one() + 1 >= max_failures
    return error.retry in (Retry.BACKOFF, Retry.ONCE) and job.failures >= max_failures


def _requeue(session: Session, job: Job, *, outcome: str, alone: bool, error: JobError | None = None) -> None:
    _close_attempt(session, job, outcome, error)
    job.state = JobState.QUEUED
    job.stage = None
    job.progress = None
    job.lease_expires_at = None
    job.dispatch_id = None
    job.queue = None
    job.missed_scans = 0
    if alone:
        job.bundle = own_bundle(job.batch_id, job.id)
    session.flush()


def _close_attempt(session: Session, job: Job, outcome: str, error: JobError | None) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job.id, Attempt.attempt == job.attempt, Attempt.ended_at.is_(None))
        .values(ended_at=db_now(), outcome=outcome, message=_text(error), cut_short=_is_cut_short(job, error) or None),
        execution_options=_NO_SYNC,
    )


def _text(error: JobError | None) -> str | None:
    # An error quotes no control characters as they are: PostgreSQL keeps no NUL.
    return str(error) if error else None


def _blame_device(session: Session, job: Job, error: JobError) -> None:
    """Quarantine the worker at its second device error in a row. The error of a model that failed on another worker's
    device too does not count: it may be the model's doing, which would cost the whole fleet, worker by worker."""
    worker = session.get(Worker, job.worker_id, with_for_update=True) if job.worker_id is not None else None
    if worker is None or _failed_elsewhere(session, job, error, worker):
        return
    worker.device_errors += 1
    if worker.device_errors >= 2:
        worker.state = "quarantined"
        worker.note = f"two device errors in a row; the last: {_text(error)}"


def _failed_elsewhere(session: Session, job: Job, error: JobError, worker: Worker) -> bool:
    other = aliased(Job)
    # A worker that was started again is another one on the same GPU.
    another = Worker.id != worker.id
    if worker.device_uuid is not None:
        another = Worker.device_uuid.is_distinct_from(worker.device_uuid)
    found = (
        select(Attempt.id)
        .join(other, other.id == Attempt.job_id)
        .join(Worker, Worker.id == Attempt.worker_id)
        .where(
            another,
            other.location == job.location,
            other.revision.is_not_distinct_from(job.revision),
            Attempt.outcome == error.kind,
        )
    )
    return session.scalars(found.limit(1)).first() is not None


def _reset_device_errors(session: Session, worker_id: int | None) -> None:
    session.execute(
        update(Worker).where(Worker.id == worker_id, Worker.device_errors > 0).values(device_errors=0),
        execution_options=_NO_SYNC,
    )
