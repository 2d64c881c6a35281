"""A worker that can no longer use its database starts nothing new and hands back what it has not begun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text, update

from qbatch.core.domain import Claim
from qbatch.core.errors import ForeignSchema
from qbatch.models_db import jobs, window
from qbatch.models_db.batches import add_text
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from qbatch.worker.serving.celery_task import _run_bundle
from qbatch.worker.serving.supervisor import Supervisor, WorkerContext
from tests.migrating import NEXT, NOT_NULL, migrate
from tests.rows import PROTOCOL, a_batch, a_job, bundle
from tests.worker_context import a_worker_context, settings_in

_MESSAGE = "4b1de4d2-0000-4000-8000-000000000000"


@pytest.fixture
def context(database: Database, tmp_path: Path) -> WorkerContext:
    return a_worker_context(database, settings_in(tmp_path))


def sent(database: Database) -> list[int]:
    _, ids = a_batch(database)
    with database.write() as session:
        session.execute(update(Job).values(dispatch_id=_MESSAGE, queue="cpu"))
    return ids


def claimed(context: WorkerContext, folder: Path) -> list[Claim]:
    """A bundle whose model is not there."""
    _, ids = a_batch(context.database, bundle(str(folder / "no-model")))
    with context.database.write() as session:
        add_text(session, PROTOCOL.eval_text_sha256, "It was a quiet evening.")
        return jobs.claim(session, ids, context.worker_id, 60.0)


def by_a_newer_version(database: Database, folder: Path) -> None:
    migrate(database, folder, (NEXT, NOT_NULL))


def by_hand(database: Database, _: Path) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE attempts RENAME COLUMN claimed_at TO taken_at"))


@pytest.mark.parametrize("change", [by_a_newer_version, by_hand])
def test_a_message_after_the_change_is_not_claimed_and_its_jobs_are_free(
    context: WorkerContext, tmp_path: Path, change: Callable[[Database, Path], None]
) -> None:
    ids = sent(context.database)
    change(context.database, tmp_path)
    assert _run_bundle(context, _MESSAGE, ids) == "nothing to do"
    assert isinstance(context.shutdown.reason, ForeignSchema)
    assert [(job.state, job.attempt) for job in (a_job(context.database, n) for n in ids)] == [("queued", 0)] * 3
    with context.database.read() as session:
        assert window.waiting_messages(session) == {}
    assert _run_bundle(context, _MESSAGE, ids) == "nothing to do"


def test_a_bundle_that_has_not_begun_is_handed_back_uncharged(context: WorkerContext, tmp_path: Path) -> None:
    claims = claimed(context, tmp_path)
    # Its runner is not heard of before that is seen: it would find that there is no such model.
    context.shutdown.request(ForeignSchema("a newer one"))
    Supervisor(context, claims).run()
    found = [a_job(context.database, claim.job_id) for claim in claims]
    assert [(job.state, job.failures, job.error_kind) for job in found] == [("queued", 0, None)] * 3
    assert sorted(context.settings.spool.glob("*")) == []


def a_refused_order(database: Database) -> None:
    """Its text is there, and nothing that reads it gets it."""
    as_words = "json_extract('{', '$')" if database.is_sqlite else "(1 / 0)::text"
    view = "CREATE VIEW texts AS SELECT sha256, AS_WORDS AS content FROM kept_texts"
    with database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE texts RENAME TO kept_texts"))
        connection.execute(text(view.replace("AS_WORDS", as_words)))


def test_a_bundle_whose_order_the_database_refuses_fails(context: WorkerContext, tmp_path: Path) -> None:
    claims = claimed(context, tmp_path)
    a_refused_order(context.database)
    Supervisor(context, claims).run()
    found = [a_job(context.database, claim.job_id) for claim in claims]
    assert [(job.state, job.error_kind) for job in found] == [("failed", "internal_error")] * 3
    assert all("refused a statement" in (job.error_message or "") for job in found)


def test_a_bundle_whose_order_a_changed_schema_refuses_is_handed_back(context: WorkerContext, tmp_path: Path) -> None:
    claims = claimed(context, tmp_path)
    with context.database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE texts RENAME COLUMN content TO words"))
    Supervisor(context, claims).run()
    found = [a_job(context.database, claim.job_id) for claim in claims]
    assert [(job.state, job.failures) for job in found] == [("queued", 0)] * 3
    assert isinstance(context.shutdown.reason, ForeignSchema), "or it would claim the next ones for nothing"
