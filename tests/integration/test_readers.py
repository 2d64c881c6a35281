"""What a command reads in one transaction fits together, whatever others write meanwhile."""

from __future__ import annotations

from sqlalchemy import select

from qbatch.core.domain import Method
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from tests.rows import a_batch, bundle


def test_a_reader_sees_one_state_of_the_database(database: Database) -> None:
    """Commands ask several times, and what they show must fit together."""
    a_batch(database, bundle("org/a", Method.NF4))
    with database.read() as session:
        before = session.scalars(select(Job.id)).all()
        a_batch(database, bundle("org/b", Method.NF4))
        assert session.scalars(select(Job.id)).all() == before
    with database.read() as session:
        assert len(session.scalars(select(Job.id)).all()) == 2
