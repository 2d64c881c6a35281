"""The jobs of batches with all that a report says of them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from qbatch.core.domain import job_number
from qbatch.models_db.job_record import JobRecord, WholeJob, job_records
from qbatch.models_db.question_answers import with_answers
from qbatch.models_db.result_filter import ResultFilter
from qbatch.models_db.results import find_results
from qbatch.models_db.session import in_chunks


def reported_jobs(session: Session, batch_ids: Sequence[int], *, models: Sequence[str] = ()) -> list[WholeJob]:
    """All jobs of these batches in the order of submission; of these models, if given: see ``ResultFilter``."""
    rows = with_answers(session, find_results(session, batch_ids=batch_ids, only=ResultFilter(models=models)))
    by_id = {row.job_id: row for row in rows}
    records: dict[str, JobRecord] = {}
    for ids in in_chunks([job_number(row.job_id) for row in rows]):
        records |= {record.job_id: record for record in job_records(session, ids)}
    return [
        WholeJob(row=row, record=records[row.job_id], baseline=by_id.get(row.baseline_job_id or "")) for row in rows
    ]
