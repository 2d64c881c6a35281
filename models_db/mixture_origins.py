"""What jobs have to do with searches for the layers to keep at 16 bits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import OPEN_STATES, format_job_id
from qbatch.core.search.mixture_origin import MixtureOrigin
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import Job

MIXTURE_COLUMNS = (Job.search, Job.search_job_id, Job.point)
"""What ``mixture_origin`` reads."""

_NONE = MixtureOrigin()


def mixture_origin(job: Any) -> MixtureOrigin:
    """What a job, or a row with ``MIXTURE_COLUMNS``, has to do with a search."""
    if job.search is None and job.point is None:
        return _NONE
    return MixtureOrigin(
        bound=None if job.search is None else job.search["bound"],
        job_id=None if job.search_job_id is None else format_job_id(job.search_job_id),
        point=job.point,
    )


def awaited_jobs(session: Session, searches: Collection[int]) -> dict[int, int]:
    """The open job of a point of each of these searches, by search, where there is one."""
    found: dict[int, int] = {}
    for chunk in in_chunks(sorted(searches)):
        query = select(Job.search_job_id, Job.id).where(Job.search_job_id.in_(chunk), Job.state.in_(OPEN_STATES))
        found |= {search: job_id for search, job_id in session.execute(query) if search is not None}
    return found
