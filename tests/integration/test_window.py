"""Which bundles are sent when: however large one is, and however many wait."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event, update

from qbatch.core.byte_units import GIB
from qbatch.core.domain import DeviceKind, Method
from qbatch.models_db import window
from qbatch.models_db.backlog_looks import BacklogLooks
from qbatch.models_db.batches import NewJob
from qbatch.models_db.ready_bundles import QueueRange
from qbatch.models_db.session import VALUES_AT_ONCE, Database
from qbatch.models_db.tables import Job
from qbatch.models_db.window import Dispatch
from qbatch.worker.serving.message_check import problem_of_ids
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


def test_no_statement_names_more_jobs_than_postgresql_takes(database: Database) -> None:
    """It takes 65,535 values, and a fleet may have been sent more jobs than that."""
    a_batch(database, *[bundle(f"/models/{n}", *_SCHEMES * 60) for n in range(6)])
    sent = [message.dispatch_id for message in choose(database, slots=6)]
    longest = 0

    def note(_connection: Any, _cursor: Any, _statement: str, parameters: Any, *_: Any) -> None:
        nonlocal longest
        longest = max(longest, len(parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    for _ in range(2):
        with database.write() as session:
            gone = window.record_scan(session, missing=sent, present=[])
    assert gone == sorted(sent)
    assert len(choose(database, slots=6)) == 6
    with database.write() as session:
        window.recall(session, served={"another"})
    event.remove(database.engine, "before_cursor_execute", note)
    assert len(choose(database, slots=6)) == 6
    assert longest < 2 * VALUES_AT_ONCE < 6 * 240


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


# A queue in which little of what waits belongs

_SMALL = QueueRange(under=20 * GIB, largest=70 * GIB)
_NEEDS = {Method.NONE: 30 * GIB, Method.NF4: 5 * GIB}


def large(model: str) -> list[NewJob]:
    """A bundle whose baseline needs more than the smaller GPUs have."""
    return bundle(model, Method.NONE, Method.NF4, device=DeviceKind.CUDA, needs=_NEEDS)


def small(model: str) -> list[NewJob]:
    return bundle(model, Method.NF4, device=DeviceKind.CUDA, needs=_NEEDS)


def choose_small(database: Database, slots: int) -> list[tuple[int, ...]]:
    """As the scheduler does: it marks what it sees, and looks at all that waits where that is little."""
    looks, chosen = BacklogLooks(), list[Dispatch]()
    while True:
        with database.write() as session:
            chosen += window.choose(
                session, kind=DeviceKind.CUDA, queue="small", slots=slots, needs=_SMALL, looks=looks
            )
        if not looks.is_wanted:
            return [message.job_ids for message in chosen]
        with database.read() as session:
            looks.look(session)


def test_what_belongs_in_a_queue_is_found_behind_much_that_does_not(database: Database) -> None:
    _, first = a_batch(database, *[large(f"/models/{n}") for n in range(300)], small("/models/x"), small("/models/y"))
    _, second = a_batch(database, *[large(f"/models/{n}") for n in range(20)], small("/models/z"))
    assert choose_small(database, slots=2) == [(first[-2],), (second[-1],)], "each batch in turn"
    assert choose_small(database, slots=3) == [(first[-1],)]
    assert choose_small(database, slots=4) == []


def test_batches_of_which_nothing_belongs_are_not_asked_one_by_one(sqlite_database: Database) -> None:
    for n in range(60):
        a_batch(sqlite_database, large(f"/models/{n}"))
    _, (last,) = a_batch(sqlite_database, small("/models/x"))
    statements = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(sqlite_database.engine, "before_cursor_execute", note)
    assert choose_small(sqlite_database, slots=4) == [(last,)]
    event.remove(sqlite_database.engine, "before_cursor_execute", note)
    assert len(statements) < 40


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


def test_what_a_message_is_called_says_what_it_does_and_is_short(database: Database) -> None:
    """A worker refuses a message with a long text, and would refuse it again whenever it is sent."""
    a_batch(database, bundle("org/model", Method.NONE, Method.NF4))
    a_batch(database, bundle(f"/models/{'a' * 4000}/last", *_SCHEMES * 80))
    first, second = choose(database)
    assert first.label == "b1 org/model: baseline, bnb-nf4 · j1, j2"
    assert second.label.endswith(
        "aaa/last: baseline, bnb-int8, bnb-nf4, bnb-fp4 · j3, j4, j5, j6, j7, j8, j9, j10 and 248 more"
    )
    assert len(second.label) < 400
