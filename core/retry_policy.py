"""The retry policy: decides what happens to a job after an attempt failed. One table, and one function that applies it.

Nothing here accesses a database or changes a job; ``models_db.jobs`` collects the facts and applies the decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from qbatch.core.errors import (
    BenchmarkError,
    BoundNotKept,
    CudaOom,
    DeviceError,
    DiskFull,
    FetchError,
    HostOom,
    InternalError,
    JobError,
    JobTimeout,
    QuantizationError,
    SourceChanged,
    SourceCorrupt,
    SourceGated,
    SourceNotFound,
    StorageError,
    UnsafeSource,
    Unsupported,
    WorkerLost,
    job_error,
)

HANDED_BACK = "handed_back"
EXPIRED = "expired"
"""The outcomes of an attempt without an error: the worker gave the job back, or was lost before the work started."""

QUARANTINED_AFTER = 2
"""The number of device errors in a row after which a worker is taken out of service."""

# An upper limit, because with many allowed failures the doubled waits would soon last days.
_LONGEST_BACKOFF_S = 3600.0


class Again(StrEnum):
    """When and where a job is tried again."""

    NEVER = "never"
    """The job fails."""
    AFTER_BACKOFF = "after a backoff"
    """The wait doubles with each failure. During the first lease after it, other live workers are preferred."""
    WHEN_THERE_IS_ROOM = "when there is room"
    """On any worker, since all share the storage. Until then, no jobs are sent to any worker."""
    ON_A_LARGER_GPU = "on a larger GPU"
    """Immediately. If no worker has a larger GPU, the job fails."""


class RetryBound(StrEnum):
    """A condition, besides the number of failures, under which a job fails instead of being tried again."""

    SECOND_TIME = "the second time in succession"
    TOO_MANY_OF_THE_KIND = "as many attempts of this kind as failures are allowed"
    TOO_MANY_CUT_SHORT = "as many attempts cut short in a row as failures are allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRule:
    """The effect of one kind of error on a job.

    ``charged``: it counts as a failure of the job. ``while_fetching`` replaces ``again`` if the attempt was still
    fetching its source. ``alone``: from now on, the job is sent in a message of its own. ``blames_device``: it counts
    against the worker. ``unrelated_to_storage``: an attempt with this error does not interrupt a series of attempts
    that storage cut short. ``may_still_succeed``: the job failed because its outcome was unknown, so a result that
    arrives later still counts.
    """

    again: Again = Again.NEVER
    charged: bool = False
    bound: RetryBound | None = None
    while_fetching: Again | None = None
    alone: bool = True
    blames_device: bool = False
    unrelated_to_storage: bool = False
    may_still_succeed: bool = False


_FAILS = RetryRule()
_CHARGED = RetryRule(again=Again.AFTER_BACKOFF, charged=True)

RULES: Mapping[str, RetryRule] = {
    CudaOom.kind: RetryRule(again=Again.ON_A_LARGER_GPU),
    HostOom.kind: _CHARGED,
    WorkerLost.kind: RetryRule(again=Again.AFTER_BACKOFF, charged=True, may_still_succeed=True),
    StorageError.kind: RetryRule(again=Again.AFTER_BACKOFF, charged=True, bound=RetryBound.TOO_MANY_CUT_SHORT),
    FetchError.kind: _CHARGED,
    DeviceError.kind: RetryRule(
        again=Again.AFTER_BACKOFF,
        # If several devices fail, the job is the likely cause, and must not put all workers into quarantine.
        bound=RetryBound.TOO_MANY_OF_THE_KIND,
        blames_device=True,
        unrelated_to_storage=True,
    ),
    JobTimeout.kind: RetryRule(again=Again.AFTER_BACKOFF, charged=True, bound=RetryBound.SECOND_TIME),
    # The job did not cause the change of its source, and its bundle should still be measured together.
    SourceChanged.kind: RetryRule(again=Again.AFTER_BACKOFF, charged=True, bound=RetryBound.SECOND_TIME, alone=False),
    DiskFull.kind: RetryRule(
        again=Again.WHEN_THERE_IS_ROOM,
        bound=RetryBound.TOO_MANY_CUT_SHORT,
        # Each machine has its own source cache, so another machine may have space.
        while_fetching=Again.AFTER_BACKOFF,
        unrelated_to_storage=True,
    ),
    SourceNotFound.kind: _FAILS,
    SourceGated.kind: _FAILS,
    SourceCorrupt.kind: _FAILS,
    UnsafeSource.kind: _FAILS,
    Unsupported.kind: _FAILS,
    QuantizationError.kind: _FAILS,
    BenchmarkError.kind: _FAILS,
    BoundNotKept.kind: _FAILS,
    # Also used for a job whose outcome arrived, but could not be recorded.
    InternalError.kind: RetryRule(may_still_succeed=True),
}
"""The rules by error kind. Every kind has one."""

_SKIPPED_IN_SERIES = frozenset(
    {HANDED_BACK, EXPIRED} | {kind for kind, rule in RULES.items() if rule.unrelated_to_storage}
)
MAY_STILL_SUCCEED = frozenset(kind for kind, rule in RULES.items() if rule.may_still_succeed)
WAITS_FOR_ROOM = frozenset(kind for kind, rule in RULES.items() if rule.again is Again.WHEN_THERE_IS_ROOM)
# Each attempt with one of these doubles the wait, but is not counted in the job's failures.
WAITS_UNCHARGED = frozenset(
    kind for kind, rule in RULES.items() if rule.bound is RetryBound.TOO_MANY_CUT_SHORT and not rule.charged
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLimits:
    """A job fails for good at failure number ``max_failures``. After the first failure it waits for ``backoff_s``, and
    after each further one twice as long."""

    backoff_s: float
    max_failures: int

    def wait_s(self, failures: int) -> float:
        """How long a job waits after ``failures`` failures, in seconds."""
        doublings = min(max(failures - 1, 0), 64)  # a float overflows after about a thousand
        return min(self.backoff_s * 2.0**doublings, max(self.backoff_s, _LONGEST_BACKOFF_S))


@dataclass(frozen=True, slots=True, kw_only=True)
class PastAttempt:
    """An ended attempt. ``outcome`` is an error kind, HANDED_BACK or EXPIRED."""

    number: int
    outcome: str | None
    was_cut_short: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What the policy needs to know of a job whose attempt number ``attempt`` has just ended.

    ``failures`` does not include this attempt; ``last_error_kind`` is the error that last put the job back into the
    queue. ``earlier`` are the attempts before this one, newest first, without those before a user's retry.
    ``no_larger_gpu`` is a message if no worker has a larger GPU than the one that ran out of memory, else None.
    """

    attempt: int
    failures: int
    last_error_kind: str | None = None
    is_fetching: bool = False
    work_started: bool = False
    earlier: Sequence[PastAttempt] = ()
    no_larger_gpu: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryDecision:
    """What to do with the job. If ``again`` is NEVER, it fails with ``error``.

    ``cut_short``: a storage fault ended the attempt in the middle of its own work. ``wait_s`` is the backoff, or how
    long the storage is considered full. The other fields are as in ``RetryRule``.
    """

    again: Again
    error: JobError
    charged: bool
    cut_short: bool = False
    wait_s: float = 0.0
    alone: bool = True
    blames_device: bool = False


def decide(error: JobError, job: JobFacts, limits: RetryLimits) -> RetryDecision:
    """Decide what happens to ``job`` after ``error``."""
    rule = RULES[error.kind]
    series = _cut_short_series(error, rule, job)
    failures = job.failures + rule.charged
    is_last = (rule.charged and failures >= limits.max_failures) or _is_reached(rule, error, job, series, limits)
    again = rule.while_fetching if job.is_fetching and rule.while_fetching is not None else rule.again
    if is_last or again is Again.NEVER or (again is Again.ON_A_LARGER_GPU and job.no_larger_gpu is not None):
        return RetryDecision(
            again=Again.NEVER,
            error=_with_history(error, job, again, series),
            charged=rule.charged,
            cut_short=bool(series),
        )
    return RetryDecision(
        again=again,
        error=error,
        charged=rule.charged,
        cut_short=bool(series),
        # Doubling ensures that a fault which lasts a minute does not use up all attempts within that minute.
        wait_s=0.0 if again is Again.ON_A_LARGER_GPU else limits.wait_s(max(failures, len(series))),
        alone=rule.alone,
        blames_device=rule.blames_device,
    )


def longest_wait_s(failures: int, error_kind: str | None, limits: RetryLimits) -> float:
    """The longest wait that the policy could have given a queued job with these values in its row, in seconds."""
    return limits.wait_s(max(failures, limits.max_failures if error_kind in WAITS_UNCHARGED else 0))


def _is_reached(rule: RetryRule, error: JobError, job: JobFacts, series: Sequence[int], limits: RetryLimits) -> bool:
    match rule.bound:
        case None:
            return False
        case RetryBound.SECOND_TIME:
            # The row still has the error that last sent the job back; a retry by the user clears it.
            return job.last_error_kind == error.kind
        case RetryBound.TOO_MANY_OF_THE_KIND:
            return 1 + sum(past.outcome == error.kind for past in job.earlier) >= limits.max_failures
        case RetryBound.TOO_MANY_CUT_SHORT:
            return len(series) >= limits.max_failures


def _cut_short_series(error: JobError, rule: RetryRule, job: JobFacts) -> list[int]:
    """The numbers of the latest consecutive attempts that storage cut short with the same kind of error, newest first,
    including this one. Empty if storage did not cut this one short.

    Attempts that ended for reasons unrelated to storage, or only waited for space, are skipped.
    """
    if rule.bound is not RetryBound.TOO_MANY_CUT_SHORT or not job.work_started or _waits_for_known_room(error):
        return []
    attempts = [job.attempt]
    for past in job.earlier:
        if past.was_cut_short and past.outcome == error.kind:
            attempts.append(past.number)
        elif past.was_cut_short or past.outcome not in _SKIPPED_IN_SERIES:
            break
    return attempts


def _waits_for_known_room(error: JobError) -> bool:
    """Whether the attempt found out before its work that the disk lacks a known amount of space. Such a wait does not
    count as cut short."""
    return isinstance(error, DiskFull) and error.needed_bytes is not None


def _with_history(error: JobError, job: JobFacts, again: Again, series: Sequence[int]) -> JobError:
    """The error that ends a job, with the numbers of the consecutive attempts that failed in the same way, or the
    message that no larger GPU exists."""
    if again is Again.ON_A_LARGER_GPU:
        return job_error(error.kind, f"{error}; it {job.no_larger_gpu}")
    if len(series) < 2:
        return error
    *others, last = (str(attempt) for attempt in reversed(series))
    return job_error(error.kind, f"{error}; attempts {', '.join(others)} and {last} in a row failed this way")
