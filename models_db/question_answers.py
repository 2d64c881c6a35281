"""How models answered the questions of tasks. The only module that writes that table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import job_number
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.task_answers import TaskAnswers
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import AnswersRow


def store_answers(session: Session, job_id: int, answers: Mapping[str, TaskAnswers]) -> None:
    """Store the answers of a job that has a result of its own."""
    # The result must be there first.
    session.flush()
    session.add_all(
        AnswersRow(job_id=job_id, task=task, answers=answered.to_json()) for task, answered in answers.items()
    )


def with_answers(
    session: Session, rows: Iterable[ResultRow], job_ids: Collection[str] | None = None
) -> list[ResultRow]:
    """``rows`` with their answers to tasks; if ``job_ids`` are given, only these rows get theirs.

    Answers are most of a database, so they are read only where they are compared.
    """
    rows = list(rows)
    answered = {
        row.job_id: job_number(row.reused_from or row.job_id)
        for row in rows
        if row.details.tasks and (job_ids is None or row.job_id in job_ids)
    }
    found = find_answers(session, answered.values())
    return [
        replace(row, answers=found[answered[row.job_id]]) if answered.get(row.job_id) in found else row for row in rows
    ]


def find_answers(session: Session, job_ids: Collection[int]) -> dict[int, dict[str, TaskAnswers]]:
    """The answers by job and task. ``job_ids``: jobs with a result of their own; some have no answers."""
    found: dict[int, dict[str, TaskAnswers]] = defaultdict(dict)
    for ids in in_chunks(sorted(set(job_ids))):
        for row in session.scalars(select(AnswersRow).where(AnswersRow.job_id.in_(ids))):
            found[row.job_id][row.task] = TaskAnswers.from_json(row.answers)
    return dict(found)
