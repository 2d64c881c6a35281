"""One sentence that sums up rows of results: how many, what to ship, what that saves, what failed and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.domain import JobState
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.recovery import with_adapter_mark
from qbatch.views.audit_text import defects
from qbatch.views.choices import Choice
from qbatch.views.formats import printable
from qbatch.views.shared_failures import name_jobs, shared_failures
from qbatch.views.units import show_bytes, show_ratio

_JOBS_NAMED = 4


def sum_up(rows: Sequence[ResultRow], choices: Sequence[Choice], *, has_reasons: bool = False) -> str:
    """``6 jobs of 2 models on NVIDIA H200: 5 succeeded, 1 failed (j6 cuda_oom). Ship … of 2 models: weights …``

    ``rows`` are those that are shown, ``choices`` those of their models. ``has_reasons``: why nothing is shipped of a
    model stands beside it.
    """
    models = len({(row.model, row.revision) for row in rows})
    jobs = f"{_count(len(rows), 'job')} of {_count(models, 'model')}"
    devices = {row.device_name for row in rows if row.device_name}
    on = f" on {devices.pop()}" if len(devices) == 1 else ""
    parts = [f"{jobs}{on}: {', '.join(_states(rows))}.", *_shipped(choices, has_reasons=has_reasons)]
    return printable(" ".join(parts))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _states(rows: Sequence[ResultRow]) -> Iterable[str]:
    for state in JobState:
        of_state = [row for row in rows if row.state == state]
        if of_state:
            yield f"{len(of_state):,} {state.value}{_remark(state, of_state)}"


def _remark(state: JobState, rows: Sequence[ResultRow]) -> str:
    if state is JobState.FAILED:
        return _why(rows)
    # The job that answers a search was measured for it, or is counted itself.
    answered = sum(row.reused_from is not None and row.mixture.bound is None for row in rows)
    unfit = [row for row in rows if state is JobState.SUCCEEDED and any(defects(row))]
    remarks = [f"{answered:,} by earlier results"] if answered else []
    remarks += (
        [f"{len(unfit):,} unfit to use: {name_jobs([row.job_id for row in unfit], _JOBS_NAMED)}"] if unfit else []
    )
    return f" ({'; '.join(remarks)})" if remarks else ""


def _why(failed: Sequence[ResultRow]) -> str:
    """`` (j3, j7 cuda_oom; j9 timeout)``, or the number of each kind if there are many."""
    if len(failed) <= _JOBS_NAMED:
        jobs = shared_failures((row.job_id, str(row.error_kind)) for row in failed)
        return f" ({'; '.join(f'{name_jobs(each.job_ids)} {each.text}' for each in jobs)})"
    kinds = Counter(str(row.error_kind) for row in failed).most_common()
    return f" ({', '.join(f'{count:,} {kind}' for kind, count in kinds)})"


def _shipped(choices: Sequence[Choice], *, has_reasons: bool) -> Iterable[str]:
    """What to ship of each model, in words. A model counts once, though it may have been measured in several ways."""
    first = _first_of_models(choices)
    shipped = [choice for choice in first if choice.ship is not None]
    if shipped:
        schemes = Counter(_scheme(choice.ship) for choice in shipped if choice.ship is not None)
        (best, number), *others = schemes.most_common()
        names = ", ".join([f"{best} of {_count(number, 'model')}", *(f"{name} of {count}" for name, count in others)])
        yield f"Ship {names}{_saved(shipped)}."
    if nothing := len(first) - len(shipped):
        where = "" if has_reasons else ": `qbatch compare` says why"
        yield f"Nothing to ship of {_count(nothing, 'model')}{where}."


def _scheme(row: ResultRow) -> str:
    if row.recovery is not None:
        return with_adapter_mark(row.scheme, row.recovery.slug)
    if row.mixture.point:  # point 0 keeps no layer
        return f"a mixture of {row.scheme}"
    return "the baseline" if row.is_baseline else row.scheme


def _first_of_models(choices: Sequence[Choice]) -> list[Choice]:
    """The first choice of each model."""
    return list({choice.model: choice for choice in reversed(choices)}.values())


def _saved(shipped: Sequence[Choice]) -> str:
    saved = weights_saved(shipped)
    if saved is None:
        return ""
    of = "" if saved.models == len(shipped) else f" of {_count(saved.models, 'model')}"
    return f": weights{of} from {show_bytes(saved.before)} to {show_bytes(saved.after)} ({show_ratio(saved.ratio)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsSaved:
    """The bytes of the weights of ``models`` baselines, and of what is shipped instead of them."""

    before: int
    after: int
    models: int

    @property
    def ratio(self) -> float:
        return self.after / self.before


def weights_saved(choices: Sequence[Choice]) -> WeightsSaved | None:
    """What is saved in memory, each model counted once. None if no model that is shipped has a baseline."""
    pairs = [(choice.baseline, choice.ship) for choice in _first_of_models(choices)]
    known = [
        (base.weights_bytes, ship.weights_bytes)
        for base, ship in pairs
        if base is not None and ship is not None and base.weights_bytes and ship.weights_bytes
    ]
    if not known:
        return None
    before, after = (sum(sizes) for sizes in zip(*known, strict=True))
    return WeightsSaved(before=before, after=after, models=len(known))
