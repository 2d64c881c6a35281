"""What happens next to a job, error kind by error kind: the whole table, and the documents that show it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qbatch.core import retry_policy
from qbatch.core.errors import ERROR_KINDS, DiskFull, JobError, ModelFault, job_error
from qbatch.core.retry_policy import (
    Again,
    JobFacts,
    PastAttempt,
    RetryBound,
    RetryDecision,
    RetryLimits,
    RetryRule,
    decide,
    longest_wait_s,
)
from qbatch.core.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"
LIMITS = RetryLimits(backoff_s=10.0, max_failures=3)
FRESH = JobFacts(attempt=1, failures=0)
BEGUN = replace(FRESH, work_started=True)

FAILS = ("never", False)
LATER = ("after a backoff", True)
LATER_UNCHARGED = ("after a backoff", False)
# By kind: what happens to a job that never failed before, and that had begun its own work.
FIRST_TIME = {
    "cuda_oom": ("on a larger GPU", False),
    "host_oom": LATER,
    "worker_lost": LATER,
    "storage_error": LATER,
    "fetch_error": LATER,
    "device_error": LATER_UNCHARGED,
    "timeout": LATER,
    "source_changed": LATER,
    "disk_full": ("when there is room", False),
    "source_not_found": FAILS,
    "source_gated": FAILS,
    "source_corrupt": FAILS,
    "unsafe_source": FAILS,
    "unsupported": FAILS,
    "quantization_error": FAILS,
    "benchmark_error": FAILS,
    "bound_not_kept": FAILS,
    "internal_error": FAILS,
}
CHARGED = {kind for kind, (_, charged) in FIRST_TIME.items() if charged}
CUT_SHORT = {"storage_error", "disk_full"}


def subclasses(cls: type[JobError]) -> Iterator[type[JobError]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def after(kind: str, facts: JobFacts = FRESH, limits: RetryLimits = LIMITS) -> RetryDecision:
    return decide(job_error(kind, "why"), facts, limits)


def past(*attempts: tuple[int, str, bool]) -> tuple[PastAttempt, ...]:
    return tuple(PastAttempt(number=n, outcome=outcome, was_cut_short=cut) for n, outcome, cut in attempts)


def test_every_error_of_a_job_has_its_rule() -> None:
    kinds = {cls.kind for cls in subclasses(JobError)}
    assert kinds == set(ERROR_KINDS) == set(retry_policy.RULES) == set(FIRST_TIME)


def test_every_kind_is_rebuilt_as_its_class() -> None:
    assert {kind: type(job_error(kind, "why")).kind for kind in ERROR_KINDS} == {kind: kind for kind in ERROR_KINDS}
    assert type(job_error(ModelFault.kind, "why")).__name__ == "BenchmarkError"


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_the_first_time(kind: str) -> None:
    decision = after(kind, BEGUN)
    assert (decision.again, decision.charged) == FIRST_TIME[kind]
    assert decision.error.kind == kind
    assert str(decision.error) == "why"
    assert decision.cut_short == (kind in CUT_SHORT)
    assert decision.blames_device == (kind == "device_error")
    assert decision.alone == (kind != "source_changed")
    assert decision.wait_s == (0.0 if decision.again in (Again.NEVER, Again.ON_A_LARGER_GPU) else 10.0)


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_while_the_source_was_fetched(kind: str) -> None:
    again, charged = FIRST_TIME[kind]
    decision = after(kind, replace(FRESH, is_fetching=True))
    # A source cache that is full is one machine's.
    assert decision.again == ("after a backoff" if kind == "disk_full" else again)
    assert (decision.charged, decision.cut_short) == (charged, False)


@pytest.mark.parametrize("kind", ERROR_KINDS)
@pytest.mark.parametrize("failures", [1, 2, 3])
def test_after_other_failures(kind: str, failures: int) -> None:
    """Of other kinds, each of which was charged."""
    decision = after(kind, replace(BEGUN, attempt=failures + 1, failures=failures, last_error_kind="another"))
    again, charged = FIRST_TIME[kind]
    is_over = charged and failures + 1 >= LIMITS.max_failures
    assert decision.again == ("never" if is_over else again)
    assert decision.charged == charged
    if decision.again in ("after a backoff", "when there is room"):
        assert decision.wait_s == 10.0 * 2 ** (failures + charged - 1)


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_the_second_time_in_succession(kind: str) -> None:
    decision = after(
        kind,
        replace(BEGUN, attempt=2, failures=1, last_error_kind=kind, earlier=past((1, kind, kind in CUT_SHORT))),
    )
    assert decision.again == ("never" if kind in ("timeout", "source_changed") else FIRST_TIME[kind][0])


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_the_third_attempt_that_ends_so(kind: str) -> None:
    """What is not charged for it has another bound, or, where it waits for what is not there, none."""
    others = past((4, "handed_back", False), (3, kind, kind in CUT_SHORT), (1, kind, kind in CUT_SHORT))
    decision = after(kind, replace(BEGUN, attempt=5, failures=2 if kind in CHARGED else 0, earlier=others))
    assert decision.again == ("on a larger GPU" if kind == "cuda_oom" else "never")


def test_a_job_that_no_gpu_is_large_enough_for_fails() -> None:
    decision = after("cuda_oom", replace(BEGUN, no_larger_gpu="needs a larger one"))
    assert (decision.again, decision.charged) == FAILS
    assert str(decision.error) == "why; it needs a larger one"


def test_attempts_that_storage_cut_short_in_a_row_are_named() -> None:
    others = past((6, "expired", False), (5, "disk_full", False), (4, "disk_full", True), (2, "disk_full", True))
    decision = after("disk_full", replace(BEGUN, attempt=7, earlier=others))
    assert (decision.again, decision.charged, decision.cut_short) == ("never", False, True)
    assert str(decision.error) == "why; attempts 2, 4 and 7 in a row failed this way"


@pytest.mark.parametrize("between", [*ERROR_KINDS, "handed_back", "expired", None])
def test_what_interrupts_a_row_of_attempts_cut_short(between: str | None) -> None:
    others = (PastAttempt(number=3, outcome=between), *past((2, "disk_full", True), (1, "disk_full", True)))
    passed_over = between in ("handed_back", "expired", "device_error", "disk_full")
    decision = after("disk_full", replace(BEGUN, attempt=4, earlier=others))
    assert decision.again == ("never" if passed_over else "when there is room")


def test_one_that_storage_cut_short_otherwise_interrupts_it_too() -> None:
    others = past((3, "storage_error", True), (2, "disk_full", True), (1, "disk_full", True))
    assert after("disk_full", replace(BEGUN, attempt=4, earlier=others)).again == "when there is room"


def test_room_that_is_known_to_be_missing_is_waited_for() -> None:
    others = past(*((n, "disk_full", True) for n in range(9, 0, -1)))
    decision = decide(DiskFull("no room", 11), replace(BEGUN, attempt=10, earlier=others), LIMITS)
    assert (decision.again, decision.cut_short, decision.wait_s) == ("when there is room", False, 10.0)


def test_attempts_that_had_not_begun_count_for_no_row() -> None:
    others = past((2, "disk_full", True), (1, "disk_full", True))
    decision = after("disk_full", replace(FRESH, attempt=3, earlier=others))
    assert (decision.again, decision.cut_short) == ("when there is room", False)


def test_attempts_cut_short_double_the_wait_though_uncharged() -> None:
    limits = RetryLimits(backoff_s=10.0, max_failures=9)
    for count, wait_s in enumerate([10.0, 20.0, 40.0, 80.0]):
        others = past(*((n, "disk_full", True) for n in range(count, 0, -1)))
        assert after("disk_full", replace(BEGUN, attempt=count + 1, earlier=others), limits).wait_s == wait_s


def test_no_wait_is_longer_than_an_hour_or_the_backoff() -> None:
    assert RetryLimits(backoff_s=10.0, max_failures=3).wait_s(5000) == 3600.0
    assert RetryLimits(backoff_s=7200.0, max_failures=3).wait_s(5000) == 7200.0
    assert RetryLimits(backoff_s=10.0, max_failures=3).wait_s(0) == 10.0


@pytest.mark.parametrize("kind", [*ERROR_KINDS, None])
def test_the_longest_wait_that_a_row_may_tell_of(kind: str | None) -> None:
    longest_s = longest_wait_s(1, kind, LIMITS)
    assert longest_s == (40.0 if kind == "disk_full" else 10.0)


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_where_a_late_result_still_counts(kind: str) -> None:
    assert (kind in retry_policy.MAY_STILL_SUCCEED) == (kind in ("worker_lost", "internal_error"))


# The documents


def rows(document: str) -> list[list[str]]:
    """The table of error kinds: the cells of each row."""
    text = (DOCS / document).read_text(encoding="utf-8")
    table = text.partition("| error kind |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def kinds_in(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def what_a_rule_does(rule: RetryRule) -> tuple[object, ...]:
    """Without what only matters to a result that arrives late, and to the history of a storage error."""
    bound = None if rule.charged and rule.bound is RetryBound.TOO_MANY_CUT_SHORT else rule.bound
    return rule.again, rule.charged, bound, rule.while_fetching, rule.blames_device


def test_the_document_names_every_kind_once_by_its_rule() -> None:
    named = [kinds_in(cells[0]) for cells in rows("reliability.md")]
    assert sorted(kind for kinds in named for kind in kinds) == sorted(ERROR_KINDS)
    does = [{what_a_rule_does(retry_policy.RULES[kind]) for kind in kinds} for kinds in named]
    assert [len(alike) for alike in does] == [1] * len(does), "one row, one rule"
    assert len(set.union(*does)) == len(does), "one rule, one row"


AGAIN_IN_WORDS = {
    Again.NEVER: "no",
    Again.AFTER_BACKOFF: "after the backoff, on another worker if there is one",
    Again.WHEN_THERE_IS_ROOM: "on any worker, when the storage has room",
    Again.ON_A_LARGER_GPU: "at once, on a larger GPU",
}
BOUND_IN_WORDS = {
    RetryBound.SECOND_TIME: "the second time in succession",
    RetryBound.TOO_MANY_OF_THE_KIND: "at the third of these attempts",
    RetryBound.TOO_MANY_CUT_SHORT: "at the third attempt in a row that it cut short",
}


def in_words(rule: RetryRule) -> list[str]:
    fetching = "" if rule.while_fetching is None else f"; while fetching: {AGAIN_IN_WORDS[rule.while_fetching]}"
    _, _, bound, *_ = what_a_rule_does(rule)
    ends = {
        Again.NEVER: ["at once"],
        Again.ON_A_LARGER_GPU: ["where no worker has a larger GPU"],
    }.get(rule.again, [])
    ends += [BOUND_IN_WORDS[bound]] if isinstance(bound, RetryBound) else []
    ends += ["at the third failure"] if rule.charged else []
    return [AGAIN_IN_WORDS[rule.again] + fetching, "yes" if rule.charged else "no", ", or ".join(ends)]


def test_the_table_of_the_promises_is_what_the_policy_says() -> None:
    defaults = Settings(home=Path(), storage=Path(), cache=Path())
    assert (defaults.max_failures, defaults.backoff_s) == (3, 10.0), "the third, and 10 s"
    shown = {kind: cells[1:] for cells in rows("reliability.md") for kind in kinds_in(cells[0])}
    assert shown == {kind: in_words(rule) for kind, rule in retry_policy.RULES.items()}
