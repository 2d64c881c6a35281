"""The answers to each question are stored with their result, and go with it."""

from __future__ import annotations

import dataclasses

from sqlalchemy import delete, func, select

from qbatch.core.domain import DeviceKind
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import Measurement
from qbatch.core.measured.task_answers import TaskAnswers
from qbatch.models_db import jobs
from qbatch.models_db.question_answers import find_answers, with_answers
from qbatch.models_db.results import find_results
from qbatch.models_db.retention import delete_jobs
from qbatch.models_db.session import Database
from qbatch.models_db.tables import AnswersRow, Result
from tests.rows import PROTOCOL, a_batch, a_worker, claim, measured, succeed

ANSWERS = {
    "quiz": TaskAnswers(questions="ab" * 16, values={"acc": (1.0, 0.0)}),
    "read/passages": TaskAnswers(questions="cd" * 8, values={"f1": (0.25,), "exact": (None,)}, clusters=(0,)),
}


def answered(database: Database) -> list[int]:
    """The jobs of a batch, of which the first has answers."""
    _, ids = a_batch(database)
    first, *others = claim(database, ids, a_worker(database))
    details = Details.from_json({"task": "causal-lm", "tasks": {"quiz": {"acc": 0.5, "acc_stderr": 0.5}}})
    measurement = dataclasses.replace(measured(), answers=ANSWERS, details=details)
    with database.write() as session:
        # What is spooled is JSON.
        read = Measurement.from_json(measurement.to_json())
        protocol = PROTOCOL.for_device(DeviceKind.CPU)
        assert jobs.succeed(session, first, read, protocol=protocol, checkpoint_path=None)
    for token in others:
        assert succeed(database, token)
    return ids


def stored(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(AnswersRow)).one()


def test_they_are_found_by_job_and_task(database: Database) -> None:
    ids = answered(database)
    with database.read() as session:
        assert find_answers(session, ids) == {ids[0]: ANSWERS}
        assert find_answers(session, ids[1:]) == {}


def test_rows_have_them_and_their_json_does_not(database: Database) -> None:
    answered(database)
    with database.read() as session:
        assert [row.answers for row in find_results(session)] == [{}, {}, {}], "few views show them"
        first, *others = with_answers(session, find_results(session))
        assert with_answers(session, find_results(session), [others[0].job_id]) == find_results(session)
    assert first.answers == ANSWERS
    assert [row.answers for row in others] == [{}, {}]
    assert "answers" not in first.to_json()


def test_pruning_a_job_removes_them(database: Database) -> None:
    ids = answered(database)
    with database.write() as session:
        assert delete_jobs(session, ids, older_than_s=-1.0) == 3
    assert stored(database) == 0


def test_an_older_version_that_does_not_know_them_prunes_too(database: Database) -> None:
    ids = answered(database)
    with database.write() as session:
        session.execute(delete(Result).where(Result.job_id.in_(ids)))
    assert stored(database) == 0
