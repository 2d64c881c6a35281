"""What to ship of each model, and what that saves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.domain import JobState
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.comparison import Preference
from qbatch.views.groups import Group, configuration, measuring_job, models_of
from qbatch.views.recommend import Recommendation, recommend


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The recommendation for a group with quantized rows."""

    model: str
    group: Group
    recommendation: Recommendation

    @property
    def ship(self) -> ResultRow | None:
        return self.recommendation.ship

    @property
    def baseline(self) -> ResultRow | None:
        """The unquantized model that ``ship`` is of, or is itself; None if it was not measured."""
        if self.ship is None or self.ship.is_baseline:
            return self.ship
        return self.group.baselines.get(self.ship.job_id)


def choices_of(rows: Sequence[ResultRow], preference: Preference) -> list[Choice]:
    """A choice for each group of ``rows`` that may be compared, if it has a quantized row."""
    choices = (choose(model.name, group, preference) for model in models_of(rows) for group in model.groups)
    return [choice for choice in choices if choice is not None]


def choose(model: str, group: Group, preference: Preference) -> Choice | None:
    """What to ship of a group; None if it has only baselines."""
    if all(row.is_baseline for row in group.rows):
        return None
    return Choice(model=model, group=group, recommendation=recommend(group, preference))


def told_apart_by_answers(rows: Sequence[ResultRow], preference: Preference) -> set[str]:
    """The jobs between which only their answers to tasks may decide. ``rows`` need not have those."""
    found: set[str] = set()
    for group in (group for model in models_of(rows) for group in model.groups):
        if sum(bool(row.details.tasks) for row in group.rows) > 1:
            recommendation = recommend(group, preference)
            if recommendation.ship is not None and recommendation.alike:
                found |= {recommendation.ship.job_id, *recommendation.alike}
    return found


def shipped_jobs(choices: Iterable[Choice], rows: Iterable[ResultRow]) -> set[str]:
    """The ids of the ``rows`` with a checkpoint that is to be shipped. Several jobs may have the same checkpoint."""
    shipped = {key for choice in choices if choice.ship is not None for key in _same(choice.ship)}
    return {row.job_id for row in rows if row.state == JobState.SUCCEEDED and not shipped.isdisjoint(_same(row))}


def _same(row: ResultRow) -> set[tuple[str | None, ...]]:
    """What rows of one checkpoint that may be compared have in common: its measurement, or its path."""
    group = (row.model, row.revision, configuration(row), row.protocol_hash, row.device_name, row.details.fingerprint)
    found: set[tuple[str | None, ...]] = {("job", measuring_job(row))}
    return found | {("path", row.checkpoint_path, *group)} if row.checkpoint_path is not None else found
