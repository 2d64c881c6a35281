"""The jobs that somebody names: by batches, by their own ids, or by both."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, false, or_

from qbatch.models_db.tables import Job


def is_named(batch_ids: Collection[int], job_ids: Collection[int]) -> ColumnElement[bool]:
    """Whether a job is one of these batches' or one of these."""
    # Without the part that names nothing: beside an empty list, SQLite finds the others by reading all jobs.
    parts = ((Job.batch_id, batch_ids), (Job.id, job_ids))
    return or_(false(), *(column.in_(ids) for column, ids in parts if ids))
