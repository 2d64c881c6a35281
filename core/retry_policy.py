"""What happens to a job after its attempt ended badly: one table, and one function that reads it.

Nothing here looks at a database or changes a job; ``models_db.jobs`` gathers the facts and carries the decision out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from qbatch.core.errors import (
    BenchmarkError,
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
"""How an attempt ends without an error: its worker gave the job back, or fell silent before the work had begun."""

QUARANTINED_AFTER = 2
"""So many device errors in a row take a worker out of service."""

# Where many failures are allowed, doubling would soon be days.
_LONGEST_BACKOFF_S = 3600.0


class Again(StrEnum):
    """When and where the job is tried again."""

    NEVER = "never"
    """The job fails."""
    AFTER_BACKOFF = "after a backoff"
    """Twice as long at each failure. For one lease it is left to another worker, where one is live."""
    WHEN_THERE_IS_ROOM = "when there is room"
    """Anywhere: the storage is everybody's. Until then nothing is sent to anybody."""
    ON_A_LARGER_GPU = "on a larger GPU"
    """At once. Where no worker has one the job fails."""


class RetryBound(StrEnum):
    """What ends a job that would otherwise be tried again, beside the number of its failures."""

    SECOND_TIME = "the second time in succession"
    TOO_MANY_OF_THE_KIND = "as many attempts of this kind as failures are allowed"
    TOO_MANY_CUT_SHORT = "as many attempts cut short in a row as failures are allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRule:
    """What an error of one kind does to a job.

    ``charged``: it counts as a failure of the job. ``while_fetching`` is in place of ``again`` for an attempt that was
    still fetching its source. ``alone``: the job is sent in a message of its own from now on. ``blames_device``: it
    counts against the worker. ``says_nothing_of_storage``: an attempt that ends so does not interrupt a row of those
    that storage cut short. ``may_still_succeed``: the job was given up for want of its outcome, so a result that
    arrives later counts.
    """

    again: Again = Again.NEVER
    charged: bool = False
    bound: RetryBound | None = None
    while_fetching: Again | None = None
    alone: bool = True
    blames_device: bool = False
    says_nothing_of_storage: bool = False
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
        # So many devices are not all sick: the job is, and must not quarantine the fleet.
        bound=RetryBound.TOO_MANY_OF_THE_KIND,
        blames_device=True,
        says_nothing_of_storage=True,
    ),
    JobTimeout.kind: RetryRule(again=Again.AFTER_BACKOFF, charged=True, bound=RetryBound.SECOND_TIME),
    # It was not the job's doing that its source changed, and its bundle is to be measured together.
    SourceChanged.kind: RetryRule(again=Again.AFTER_BACKOFF, charged=True, bound=RetryBound.SECOND_TIME, alone=False),
    DiskFull.kind: RetryRule(
        again=Again.WHEN_THERE_IS_ROOM,
        bound=RetryBound.TOO_MANY_CUT_SHORT,
        # The source cache is one machine's: another may have room in its own.
        while_fetching=Again.AFTER_BACKOFF,
        says_nothing_of_storage=True,
    ),
    SourceNotFound.kind: _FAILS,
    SourceGated.kind: _FAILS,
    SourceCorrupt.kind: _FAILS,
    UnsafeSource.kind: _FAILS,
    Unsupported.kind: _FAILS,
    QuantizationError.kind: _FAILS,
    BenchmarkError.kind: _FAILS,
    # Also of a job whose outcome was heard and could not be recorded.
    InternalError.kind: RetryRule(may_still_succeed=True),
}
"""By error kind; every kind is here."""

_PASSED_OVER = frozenset(
    {HANDED_BACK, EXPIRED} | {kind for kind, rule in RULES.items() if rule.says_nothing_of_storage}
)
MAY_STILL_SUCCEED = frozenset(kind for kind, rule in RULES.items() if rule.may_still_succeed)
WAITS_FOR_ROOM = frozenset(kind for kind, rule in RULES.items() if rule.again is Again.WHEN_THERE_IS_ROOM)
# Each attempt doubles the wait, and the job's failures do not show how many there were.
WAITS_UNCHARGED = frozenset(
    kind for kind, rule in RULES.items() if rule.bound is RetryBound.TOO_MANY_CUT_SHORT and not rule.charged
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLimits:
    """A job fails at its ``max_failures``-th failure. After the first it waits ``backoff_s``, doubled each time."""

    backoff_s: float
    max_failures: int

    def wait_s(self, failures: int) -> float:
        """How long a job waits after so many failures; nothing has it wait for longer."""
        doublings = min(max(failures - 1, 0), 64)  # a float holds no more than a thousand of them
        return min(self.backoff_s * 2.0**doublings, max(self.backoff_s, _LONGEST_BACKOFF_S))


@dataclass(frozen=True, slots=True, kw_only=True)
class PastAttempt:
    """An attempt that is over. ``outcome`` is an error kind or one of the outcomes above."""

    number: int
    outcome: str | None
    was_cut_short: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What the policy asks of a job whose attempt ``attempt`` has ended.

    ``failures`` is without this one; ``last_error_kind`` is what sent the job back last. ``earlier`` are the attempts
    before this one, the last first, without those that a user's retry forgave. ``no_larger_gpu`` says what is missing
    where no worker has a larger GPU than the one that ran out of memory.
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
    """What is to be done with the job. Where ``again`` is NEVER it fails with ``error``.

    ``cut_short``: storage failed the attempt in the middle of its own work. ``wait_s`` is the backoff, or for how long
    the storage counts as full. The other fields are as in ``RetryRule``.
    """

    again: Again
    error: JobError
    charged: bool
    cut_short: bool = False
    wait_s: float = 0.0
    alone: bool = True
    blames_device: bool = False


def decide(error: JobError, job: JobFacts, limits: RetryLimits) -> RetryDecision:
    """What happens to ``job`` after ``error``."""
    rule = RULES[error.kind]
    in_a_row = _cut_short_in_a_row(error, rule, job)
    failures = job.failures + rule.charged
    is_last = (rule.charged and failures >= limits.max_failures) or _is_reached(rule, error, job, in_a_row, limits)
    again = rule.while_fetching if job.is_fetching and rule.while_fetching is not None else rule.again
    if is_last or again is Again.NEVER or (again is Again.ON_A_LARGER_GPU and job.no_larger_gpu is not None):
        return RetryDecision(
            again=Again.NEVER,
            error=_with_history(error, job, again, in_a_row),
            charged=rule.charged,
            cut_short=bool(in_a_row),
        )
    return RetryDecision(
        again=again,
        error=error,
        charged=rule.charged,
        cut_short=bool(in_a_row),
        # Doubling, so that what is broken for a minute does not use up every attempt in that minute.
        wait_s=0.0 if again is Again.ON_A_LARGER_GPU else limits.wait_s(max(failures, len(in_a_row))),
        alone=rule.alone,
        blames_device=rule.blames_device,
    )


def longest_wait_s(failures: int, error_kind: str | None, limits: RetryLimits) -> float:
    """The longest that a queued job may have been told to wait, by what its row says."""
    return limits.wait_s(max(failures, limits.max_failures if error_kind in WAITS_UNCHARGED else 0))


def _is_reached(rule: RetryRule, error: JobError, job: JobFacts, in_a_row: Sequence[int], limits: RetryLimits) -> bool:
    match rule.bound:
        case None:
            return False
        case RetryBound.SECOND_TIME:
            # The row still says what sent the job back last; a retry by the user wiped it.
            return job.last_error_kind == error.kind
        case RetryBound.TOO_MANY_OF_THE_KIND:
            return 1 + sum(past.outcome == error.kind for past in job.earlier) >= limits.max_failures
        case RetryBound.TOO_MANY_CUT_SHORT:
            return len(in_a_row) >= limits.max_failures


def _cut_short_in_a_row(error: JobError, rule: RetryRule, job: JobFacts) -> list[int]:
    """The job's latest attempts that storage cut short in this one way, the last first, this one among them; none where
    this one was not.

    Those that came back without a fault of their own, or waited for room, are passed over.
    """
    if rule.bound is not RetryBound.TOO_MANY_CUT_SHORT or not job.work_started or _waits_for_known_room(error):
        return []
    found = [job.attempt]
    for past in job.earlier:
        if past.was_cut_short and past.outcome == error.kind:
            found.append(past.number)
        elif past.was_cut_short or past.outcome not in _PASSED_OVER:
            break
    return found


def _waits_for_known_room(error: JobError) -> bool:
    """To wait for room that is known to be missing is no failure in the middle of the work."""
    return isinstance(error, DiskFull) and error.needed_bytes is not None


def _with_history(error: JobError, job: JobFacts, again: Again, in_a_row: Sequence[int]) -> JobError:
    """The error that ends a job: with the attempts that ended so in a row, where there were several, or with what is
    missing."""
    if again is Again.ON_A_LARGER_GPU:
        return job_error(error.kind, f"{error}; it {job.no_larger_gpu}")
    if len(in_a_row) < 2:
        return error
    *others, last = (str(attempt) for attempt in reversed(in_a_row))
    return job_error(error.kind, f"{error}; attempts {', '.join(others)} and {last} in a row ended so")
