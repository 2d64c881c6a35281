"""Hides batches that are still being stored from every statement of a session. For SQLite; see ``arrivals``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria

from qbatch.models_db.tables import Arrival, Batch, Job

ALSO_ARRIVING: Mapping[str, bool] = {"qbatch_also_arriving": True}
"""The execution option of a statement that must see such batches too."""

_KNOWN = "qbatch_arriving"


def hide_arriving(state: ORMExecuteState) -> None:
    """Add to a statement that it means neither those batches nor their jobs, also within subqueries and aliases.

    A transaction of SQLite reads one state of the database from its first statement to its end. So it is enough to ask
    once for the batches, and where there are none, which is nearly always, statements stay as they are.
    """
    is_query = state.is_select or state.is_update or state.is_delete
    if (
        not is_query
        or not state.is_orm_statement
        or state.is_column_load
        or set(ALSO_ARRIVING) & set(state.execution_options)
    ):
        return
    if hidden := _arriving(state.session):
        state.statement = state.statement.options(
            with_loader_criteria(Job, Job.batch_id.not_in(hidden), include_aliases=True),
            with_loader_criteria(Batch, Batch.id.not_in(hidden), include_aliases=True),
        )


def _arriving(session: Session) -> Sequence[int]:
    if _KNOWN not in session.info:
        # Not an ORM statement: it is not filtered itself.
        session.info[_KNOWN] = session.connection().scalars(select(Arrival.__table__.c.batch_id)).all()
    known: Sequence[int] = session.info[_KNOWN]
    return known
