"""Which bundles are sent when: however large one is, and however many wait."""

from __future__ import annotations

from sqlalchemy import update

from qbatch.core.domain import DeviceKind, Method
from qbatch.models_db import window
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from qbatch.models_db.window import Dispatch
from qbatch.worker.serving.message_vet import problem_of_ids
from tests.rows import a_batch, a_worker, bundle, claim, states, succeed

_SCHEMES = (Method.NONE, Method.INT8, Method.NF4, Method.FP4)


def choose(database: Database, slots: int = 4) -> list[Dispatch]:
    with database.write() as session:
        return window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=slots)


def test_a_bundle_too_large_for_one_message_is_sent_in_several_in_turn(database: Database) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a", *_SCHEMES * 130))
    sent: list[int] = []
    while "queued" in states(database).values():
        (message,) = choose(database)
        assert problem_of_ids(list(message.job_ids)) is None, "a worker takes it"
        assert choose(database) == [], "the rest waits while the message does"
        tokens = claim(database, list(message.job_ids), worker)
        assert choose(database) == [], "and while its jobs run: they write the checkpoints, and measure the baseline"
        sent += message.job_ids
        assert all(succeed(database, token) for token in tokens)
    assert sent == ids
    assert choose(database) == []


def test_while_a_part_of_a_bundle_is_under_way_others_are_sent(database: Database) -> None:
    _, large = a_batch(database, bundle("/models/a", *_SCHEMES * 80))
    _, small = a_batch(database, bundle("/models/b"))
    assert [message.job_ids for message in choose(database)] == [tuple(large[:256]), tuple(small)]


def test_the_rest_of_a_bundle_goes_when_the_message_before_it_was_lost(database: Database) -> None:
    _, ids = a_batch(database, bundle("/models/a", *_SCHEMES * 80))
    (lost,) = choose(database)
    with database.write() as session:
        window.take_out(session, [lost.dispatch_id])
    (again,) = choose(database)
    assert again.job_ids == lost.job_ids == tuple(ids[:256])


def test_many_jobs_that_want_one_checkpoint_do_not_slow_the_choice(sqlite_database: Database) -> None:
    count = 1000
    a_batch(sqlite_database, *[bundle("/models/a", Method.NF4) for _ in range(count)])
    steps = 0

    def thousand_more() -> int:
        nonlocal steps
        steps += 1000
        return 0

    with sqlite_database.write() as session:
        session.execute(update(Job).values(checkpoint_key="one"))
        driver = session.connection().connection.dbapi_connection
        assert driver is not None
        driver.set_progress_handler(thousand_more, 1000)
        assert len(window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=4)) == 1
        driver.set_progress_handler(None, 0)
    assert steps < 1000 * count, "of SQLite's machine; to look at every job for each of them takes ten times as many"
