"""How long a job will take, judged by jobs that have ended. Needs no database: ``models_db/past_runs.py`` reads them.

What is assumed:

- A job's seconds are its share of the time for which a worker held its bundle (``share_of_bundle``): the jobs of a
  bundle read one source and take turns on one device, so only the whole bundle has a time of its own. The shares are
  equal. So their sum over a bundle is right, while a single one is right only as far as its schemes take equally long.
- What a bundle is like (how many schemes it has, whether its source was fetched already) does not differ from those
  before.
- Between two sizes of models that were seen, the time rises evenly with the number of parameters. A model smaller than
  any takes as long as the smallest, since what is fixed in that time is not known. A larger one goes on along the line
  through the smallest and the largest, or in proportion where only one size was seen, and no further than
  ``_FARTHEST`` times the largest.
- Every device of a kind is as fast as those before. Which one will get the job is not known.
- An adapter takes what others of its kind took; a trained one in proportion to its steps, but for what its checkpoint
  alone would take. Before there was any, it takes at least what the checkpoint alone does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Self

from qbatch.core.domain import JobSpec, Protocol
from qbatch.core.kinds import DeviceKind
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.recovery import RecoveryKind
from qbatch.core.search.bound import AUTO

# How much larger than the largest model that was seen another may be.
_FARTHEST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class JobWork:
    """What decides how long a job takes. ``parameters`` is None where the model's size is not known: it is then taken
    from earlier runs of the same ``location``. ``has_tasks`` says whether tasks of lm-evaluation-harness are asked.
    ``recovery``: the kind of the adapter that is made, and ``steps`` those of its training."""

    method: str
    device_kind: DeviceKind
    protocol_hash: str
    parts: frozenset[MeasuredPart]
    has_tasks: bool
    location: str
    parameters: int | None
    recovery: RecoveryKind | None = None
    steps: int | None = None

    @classmethod
    def of(cls, spec: JobSpec, device_kind: DeviceKind, parameters: int | None) -> Self:
        """``device_kind`` is CUDA or CPU."""
        if spec.search is not None:
            return cls.of_search(spec.scheme.method, device_kind, spec.source.location, parameters)
        protocol: Protocol = spec.protocol.for_device(device_kind)
        recovery = spec.scheme.recovery
        return cls(
            method=spec.scheme.method,
            device_kind=device_kind,
            protocol_hash=protocol.hash,
            parts=protocol.parts,
            has_tasks=bool(protocol.tasks),
            location=spec.source.location,
            parameters=parameters,
            recovery=None if recovery is None else recovery.kind,
            steps=None if recovery is None else recovery.steps,
        )

    @classmethod
    def of_search(cls, method: str, device_kind: DeviceKind, location: str, parameters: int | None) -> Self:
        """A search for the layers to keep at 16 bits. It measures nothing that another job does, and is compared with
        other searches alone."""
        return cls(
            method=f"{method} {AUTO}",
            device_kind=device_kind,
            protocol_hash=AUTO,
            parts=frozenset(),
            has_tasks=False,
            location=location,
            parameters=parameters,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRun:
    """A job that has ended with a result of its own. ``seconds`` is its share of its bundle's time; a search's are its
    own. ``token_s``: of a baseline whose prefill was timed, the seconds that each token of it took."""

    work: JobWork
    seconds: float
    token_s: float | None = None


class Basis(StrEnum):
    """Which earlier jobs an estimate is from, the best founded first."""

    SAME_MEASUREMENT = "the same method and measurement"
    SAME_METHOD = "the same method"
    ANY_METHOD = "other methods"
    WITHOUT_ADAPTER = "the same without an adapter"
    PREFILLS = "the time of prefills"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """``runs`` earlier jobs say so. ``is_beyond``: all of them were of smaller models. ``is_least``: it takes at least
    as long."""

    seconds: float
    runs: int
    basis: Basis
    is_beyond: bool = False
    is_least: bool = False

    def followed_by(self, other: TimeEstimate | None) -> TimeEstimate | None:
        """The time of both jobs, one after the other; None if that of the other is not known."""
        if other is None:
            return None
        return replace(
            self,
            seconds=self.seconds + other.seconds,
            runs=min(self.runs, other.runs),
            is_beyond=self.is_beyond or other.is_beyond,
            is_least=self.is_least or other.is_least,
        )

    @property
    def is_rough(self) -> bool:
        """Whether it may well be off by more than its runs differ among themselves."""
        return self.is_beyond or self.runs < 3 or self.basis not in (Basis.SAME_MEASUREMENT, Basis.SAME_METHOD)


def estimate_duration(work: JobWork, runs: Sequence[PastRun]) -> TimeEstimate | None:
    """The seconds that ``work`` will keep one device busy; None if nothing comparable has run."""
    parameters = known_parameters(work, runs)
    if parameters is None:
        return None
    alike = [run for run in runs if _does_the_same(run.work, work) and run.work.parameters]
    same_method = [run for run in alike if run.work.method == work.method]
    same = [run for run in same_method if run.work.protocol_hash == work.protocol_hash]
    if work.recovery is not None:
        return _of_adapter(work, parameters, same_method, runs)
    for basis, chosen in ((Basis.SAME_MEASUREMENT, same), (Basis.SAME_METHOD, same_method), (Basis.ANY_METHOD, alike)):
        if (estimate := estimate_at(parameters, chosen, basis)) is not None:
            return estimate
    return None


def estimate_at(parameters: int, runs: Sequence[PastRun], basis: Basis) -> TimeEstimate | None:
    """From these ``runs`` alone, by the number of parameters; None where they are too far away."""
    points = _medians(runs)
    seconds = _at(parameters, points)
    if seconds is None:
        return None
    return TimeEstimate(seconds=seconds, runs=len(runs), basis=basis, is_beyond=parameters > points[-1][0])


def known_parameters(work: JobWork, runs: Iterable[PastRun]) -> int | None:
    """Those of the model, if they are known or it was measured before."""
    if work.parameters is not None:
        return work.parameters
    return next((run.work.parameters for run in runs if run.work.location == work.location), None)


def _of_adapter(
    work: JobWork, parameters: int, same_kind: Sequence[PastRun], runs: Sequence[PastRun]
) -> TimeEstimate | None:
    plain = estimate_duration(replace(work, recovery=None, steps=None), runs)
    base_s = 0.0 if plain is None else plain.seconds
    own = [replace(run, seconds=_with_steps(run, work.steps, base_s)) for run in same_kind]
    found = estimate_at(parameters, own, Basis.SAME_METHOD)
    if found is not None or plain is None:
        return found
    return replace(plain, basis=Basis.WITHOUT_ADAPTER, is_least=True)


def _with_steps(run: PastRun, steps: int | None, base_s: float) -> float:
    """The seconds that a run of another number of steps would have taken."""
    ratio = 1.0 if steps is None or not run.work.steps else steps / run.work.steps
    return base_s + (run.seconds - base_s) * ratio if run.seconds > base_s else run.seconds


def share_of_bundle(held: Iterable[tuple[float, float]], jobs: int) -> float:
    """The seconds of each of ``jobs`` jobs of a bundle, of which a worker held some in each of these times, given as
    (begin, end) in seconds. Times that overlap count once."""
    total, covered_to = 0.0, float("-inf")
    for begin, end in sorted(held):
        total += max(0.0, end - max(begin, covered_to))
        covered_to = max(covered_to, end)
    return total / jobs


def _does_the_same(one: JobWork, other: JobWork) -> bool:
    """Whether they measure the same parts on such a device, and make the same kind of adapter or none."""
    mine = (one.device_kind, one.parts, one.has_tasks, one.recovery)
    return mine == (other.device_kind, other.parts, other.has_tasks, other.recovery)


def _medians(runs: Iterable[PastRun]) -> list[tuple[int, float]]:
    """(parameters, median of the seconds) of each size, the smallest first."""
    by_size: dict[int, list[float]] = {}
    for run in runs:
        by_size.setdefault(run.work.parameters or 0, []).append(run.seconds)
    return [(size, sorted(seconds)[len(seconds) // 2]) for size, seconds in sorted(by_size.items())]


def _at(parameters: int, points: Sequence[tuple[int, float]]) -> float | None:
    """The seconds at this size, along the line through ``points``; None where it is too far from all of them."""
    if not points or parameters > _FARTHEST * points[-1][0]:
        return None
    if parameters <= points[0][0]:
        return points[0][1]
    for (smaller, least), (larger, most) in pairwise(points):
        if parameters <= larger:
            return least + (most - least) * (parameters - smaller) / (larger - smaller)
    return _beyond(parameters, points[0], points[-1])


def _beyond(parameters: int, smallest: tuple[int, float], largest: tuple[int, float]) -> float:
    if smallest == largest:
        return largest[1] * parameters / largest[0]
    slope = max(0.0, (largest[1] - smallest[1]) / (largest[0] - smallest[0]))
    return largest[1] + slope * (parameters - largest[0])
