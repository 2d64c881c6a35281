"""Which rows of results are wanted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, or_

from qbatch.core.search.bound import AUTO
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.tables import Job, Result

_LIKE_ESCAPE = "\\"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultFilter:
    """Conditions that a row must meet; what is None or empty is none.

    Of several values of one condition, any will do. Each of ``models`` and ``devices`` is a part of the name, or a
    pattern with * and ? for the whole name; upper and lower case count as the same. ``AUTO`` among ``schemes`` stands
    for searches. ``since_s``: only jobs that ended within the last so many seconds, or if they have not ended, were
    submitted then. A row without a figure is not within a limit on it.
    """

    models: Collection[str] = ()
    schemes: Collection[str] = ()
    bits: Collection[int] = ()
    devices: Collection[str] = ()
    states: Collection[str] = ()
    since_s: float | None = None
    max_weights_bytes: int | None = None
    max_kl: float | None = None
    min_tokens_per_s: float | None = None

    @property
    def hides_nothing(self) -> bool:
        return self == ResultFilter()

    @property
    def is_of_results(self) -> bool:
        """Whether a condition is about what was measured."""
        limits = (self.max_weights_bytes, self.max_kl, self.min_tokens_per_s)
        return bool(self.devices) or any(limit is not None for limit in limits)

    def conditions(self) -> list[ColumnElement[bool]]:
        """For a query of jobs, joined with their results if ``is_of_results``."""
        found: list[ColumnElement[bool]] = []
        if self.models:
            found.append(_matches_any(Job.model.expression, self.models))
        if AUTO in self.schemes:
            found.append(or_(Job.search.is_not(None), Job.method.in_(self.schemes)))
        elif self.schemes:
            found.append(Job.method.in_(self.schemes))
        for column, values in ((Job.bits, self.bits), (Job.state, self.states)):
            if values:
                found.append(column.in_(values))
        if self.since_s is not None:
            found.append(func.coalesce(Job.finished_at, Job.created_at) > db_now(-self.since_s))
        return [*found, *self._of_results()]

    def _of_results(self) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = []
        if self.devices:
            found.append(_matches_any(Result.device_name.expression, self.devices))
        if self.max_weights_bytes is not None:
            found.append(Result.weights_bytes <= self.max_weights_bytes)
        if self.max_kl is not None:
            found.append(Result.kl_mean <= self.max_kl)
        if self.min_tokens_per_s is not None:
            found.append(Result.decode_tokens_per_s >= self.min_tokens_per_s)
        return found


def _matches_any(column: ColumnElement[Any], texts: Collection[str]) -> ColumnElement[bool]:
    return or_(*(_matches(column, text) for text in texts))


def _matches(column: ColumnElement[Any], text: str) -> ColumnElement[bool]:
    is_pattern = "*" in text or "?" in text
    escaped = text
    for special in (_LIKE_ESCAPE, "%", "_"):
        escaped = escaped.replace(special, _LIKE_ESCAPE + special)
    pattern = escaped.replace("*", "%").replace("?", "_") if is_pattern else f"%{escaped}%"
    return column.ilike(pattern, escape=_LIKE_ESCAPE)
