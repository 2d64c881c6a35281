"""The checkpoints of jobs with what was measured of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import JobState, format_job_id
from qbatch.core.measured.result_row import ResultRow
from qbatch.models_db.model_jobs import jobs_of_families
from qbatch.models_db.results import find_results
from qbatch.models_db.tables import Checkpoint, Job


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCheckpoint:
    """A checkpoint at ``path`` within the storage, the row that tells most of it, and its baseline's row."""

    path: str
    root_sha256: str
    is_folder: bool
    row: ResultRow
    baseline: ResultRow | None


def measured_checkpoints(session: Session, job_ids: Collection[int]) -> list[MeasuredCheckpoint]:
    """The checkpoints of these jobs, and of the others of their batches with the same source.

    The others, because a baseline that was measured later says something of them. A measured job tells more than one
    that failed, and a newer one more than an older one.
    """
    sources = session.execute(select(Job.batch_id, Job.location).where(Job.id.in_(job_ids)).distinct()).all()
    if not sources:
        return []
    ids = jobs_of_families(session, {(batch_id, location) for batch_id, location in sources})
    found = session.execute(
        select(Job.id, Job.is_folder, Checkpoint.path, Checkpoint.root_sha256)
        .join(Checkpoint, Checkpoint.key == Job.checkpoint_key)
        .where(Job.id.in_(ids), Checkpoint.gone_at.is_(None))
        .order_by(Job.id)
    ).all()
    if not found:
        return []
    rows = {row.job_id: row for row in find_results(session, job_ids=ids)}
    chosen: dict[str, MeasuredCheckpoint] = {}
    for job_id, is_folder, path, root_sha256 in found:
        row = rows[format_job_id(job_id)]
        before = chosen.get(path)
        if before is not None and before.row.state == JobState.SUCCEEDED != row.state:
            continue
        chosen[path] = MeasuredCheckpoint(
            path=path,
            root_sha256=root_sha256,
            is_folder=is_folder,
            row=row,
            baseline=rows.get(row.baseline_job_id or ""),
        )
    return list(chosen.values())
