"""A lease is one holder's, on both databases, until it runs out or is given up."""

from __future__ import annotations

from qbatch.models_db.leases import acquire, release
from qbatch.models_db.session import Database


def take(database: Database, holder: str, ttl_s: float = 60.0) -> bool:
    with database.write() as session:
        return acquire(session, "gpu:x", holder, ttl_s)


def test_one_holds_a_lease_and_others_are_told_that_they_do_not(database: Database) -> None:
    assert take(database, "first")
    for _ in range(3):
        assert not take(database, "second")
        assert take(database, "first"), "it renews its own"


def test_a_lease_that_ran_out_or_was_given_up_is_taken(database: Database) -> None:
    assert take(database, "first", -1.0)
    assert take(database, "second")
    assert not take(database, "first")
    with database.write() as session:
        release(session, "gpu:x", "first")  # not its own any more
    assert not take(database, "first")
    with database.write() as session:
        release(session, "gpu:x", "second")
    assert take(database, "first")
