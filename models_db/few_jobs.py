"""Kinds of jobs of which there are few, or of which only the first are looked at, each with an index of its own.

The conditions are those of the indexes in ``tables``, word for word: otherwise a database does not use them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, String, and_, func, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from qbatch.core.domain import JobState
from qbatch.models_db.tables import Job


class _WithoutIndex(FunctionElement[str]):
    """A column, such that no index that begins with it is used: both databases like to read all jobs of a state."""

    type = String()
    inherit_cache = True


@compiles(_WithoutIndex, "sqlite")
def _sqlite(element: _WithoutIndex, compiler: Any, **kw: Any) -> str:
    return f"+{compiler.process(element.clauses, **kw)}"


@compiles(_WithoutIndex, "postgresql")
def _postgresql(element: _WithoutIndex, compiler: Any, **kw: Any) -> str:
    return f"({compiler.process(element.clauses, **kw)} || '')"


def _state_is(state: JobState) -> ColumnElement[bool]:
    return _WithoutIndex(Job.state) == literal(state.value, literal_execute=True)


IS_QUEUED: ColumnElement[bool] = and_(_state_is(JobState.QUEUED), Job.search_id.is_(None))
"""Queued, and not a search that waits for its points' jobs. For jobs that are found in another way."""

IS_WAITING: ColumnElement[bool] = and_(IS_QUEUED, Job.dispatch_id.is_(None))
"""Queued, and not in Redis. Their index is in the order of priority, batch and id."""

STILL_WAITS: ColumnElement[bool] = and_(IS_QUEUED, func.coalesce(Job.dispatch_id, "") == "")
"""As ``IS_WAITING``, but in a form that fits no index, for jobs that are found in another way."""

WAITS_AGAIN: ColumnElement[bool] = and_(IS_QUEUED, Job.attempt > literal(0, literal_execute=True))
"""Queued after an attempt. Only these can have run out of memory, or wait for a time or for space."""

HAS_FAILED: ColumnElement[bool] = _state_is(JobState.FAILED)
"""Failed. Their index is in the order of time."""

HAS_BASE: ColumnElement[bool] = Job.base_key.is_not(None)
"""Has an adapter, which belongs to a checkpoint."""
