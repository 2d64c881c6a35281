"""What searches for the layers to keep at 16 bits found, by key."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from qbatch.core.search.finished_search import FinishedSearch
from qbatch.core.search.frontier import Frontier
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import NO_SYNC, in_chunks
from qbatch.models_db.tables import Job, SearchRow


def add(session: Session, key: str, job_id: int, found: FinishedSearch, *, again: bool) -> int:
    """Store what a search found, unless its key is there, and return the id of the row that answers.

    ``again``: store it in any case. What is there stays for the jobs that refer to it.
    """
    known = newest(session, [key])
    if key in known and not again:
        return known[key]
    stored = found.to_json()
    row = SearchRow(key=key, job_id=session.scalar(select(Job.id).where(Job.id == job_id)), **stored)
    session.add(row)
    session.flush()
    return row.id


def newest(session: Session, keys: Collection[str]) -> dict[str, int]:
    """The ids of the newest searches with these keys, by key."""
    found: dict[str, int] = {}
    for chunk in in_chunks(sorted(keys)):
        query = select(SearchRow.key, func.max(SearchRow.id)).where(SearchRow.key.in_(chunk)).group_by(SearchRow.key)
        found |= {key: search_id for key, search_id in session.execute(query)}
    return found


def forget_unused(session: Session, older_than_s: float) -> None:
    """Delete what was found longer than ``older_than_s`` ago, unless a job refers to it."""
    has_job = select(Job.id).where(Job.search_id == SearchRow.id).exists()
    old = delete(SearchRow).where(SearchRow.created_at < db_now(-older_than_s), ~has_job)
    session.execute(old, execution_options=NO_SYNC)


def find_frontier_of(session: Session, search_id: int) -> Frontier:
    """The frontier that a search found, without the sensitivities, which are as long."""
    return Frontier.from_json(session.execute(select(SearchRow.frontier).where(SearchRow.id == search_id)).scalar_one())


def find_searches(session: Session, ids: Collection[int]) -> dict[int, FinishedSearch]:
    """Everything that was stored of these searches, by id. A search that does not exist is left out."""
    rows = session.scalars(select(SearchRow).where(SearchRow.id.in_(ids))) if ids else ()
    return {row.id: _finished(row) for row in rows}


def _finished(row: SearchRow) -> FinishedSearch:
    return FinishedSearch.from_json(
        {
            "sensitivity": row.sensitivity,
            "frontier": row.frontier,
            "parameters": row.parameters,
            "seconds": row.seconds,
            "device_name": row.device_name,
        }
    )
