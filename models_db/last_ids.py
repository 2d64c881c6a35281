"""The ids of new batches and jobs on SQLite, which by itself would give those of removed rows a second time.

Scripts, links, folders of logs and spooled outcomes name a batch or a job by its id, so another one must never have it.
"""

from __future__ import annotations

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from qbatch.models_db.arrival_filter import ALSO_ARRIVING
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Batch, Job, LastId


def next_ids(session: Session, table: type[Batch | Job], count: int) -> range | None:
    """Take ``count`` ids that no row had before. None on PostgreSQL, whose sequences give them."""
    if session.get_bind().dialect.name != "sqlite":
        return None
    # An older version adds rows without a note of them.
    highest = select(func.coalesce(func.max(table.id), 0)).scalar_subquery()
    taken = (
        update(LastId)
        .where(LastId.table_name == table.__tablename__)
        .values(id=func.max(LastId.id, highest) + count)
        .returning(LastId.id)
    )
    last = session.execute(taken, execution_options={**NO_SYNC, **ALSO_ARRIVING}).scalar_one()
    return range(last - count + 1, last + 1)
