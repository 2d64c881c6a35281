"""The id of a batch or job that was removed is never that of another one, on either database."""

from __future__ import annotations

from sqlalchemy import text

from qbatch.core.errors import SourceCorrupt
from qbatch.models_db import retention
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from tests.migrating import downgrade_to
from tests.rows import a_batch, a_worker, bundle, claim, fail


def remove(database: Database, batch_id: int, job_ids: list[int]) -> None:
    """What `qbatch rm` does to the rows of a batch that has ended."""
    for token in claim(database, job_ids, a_worker(database, f"of b{batch_id}")):
        fail(database, token, SourceCorrupt("no weights"))
    with database.write() as session:
        assert retention.delete_named(session, job_ids) == set(job_ids)
        assert retention.delete_empty(session, [batch_id]) == 1


def test_a_removed_newest_batch_and_its_jobs_keep_their_ids_to_themselves(database: Database) -> None:
    a_batch(database)
    removed, jobs = a_batch(database)
    remove(database, removed, jobs)
    batch_id, ids = a_batch(database, bundle("/models/b"), bundle("/models/c"))
    assert batch_id > removed
    assert min(ids) > max(jobs)
    assert ids == list(range(ids[0], ids[0] + 6)), "in the order of submission"


def test_an_upgraded_database_knows_the_ids_that_it_had(sqlite_database: Database) -> None:
    removed, jobs = a_batch(sqlite_database)
    downgrade_to(sqlite_database, "0016")
    upgrade(sqlite_database)
    remove(sqlite_database, removed, jobs)
    batch_id, ids = a_batch(sqlite_database)
    assert (batch_id > removed, min(ids) > max(jobs)) == (True, True)


def test_a_row_that_an_older_version_adds_is_in_nobodys_way(sqlite_database: Database) -> None:
    a_batch(sqlite_database)
    with sqlite_database.write() as session:
        session.execute(
            text("INSERT INTO batches (id, priority, options, created_at) VALUES (9, 0, '{}', '2026-01-01')")
        )
    assert a_batch(sqlite_database)[0] == 10
