"""The PostgreSQL that the tests share is to each as if the migrations had just run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import Connection, inspect, text

from qbatch.models_db.database_id import database_id
from qbatch.models_db.session import SCHEMA_HEAD, Database
from tests.postgres import UpgradedPostgres
from tests.rows import a_batch


def test_it_is_empty_and_another_database(upgraded_postgresql: UpgradedPostgres) -> None:
    first = upgraded_postgresql.renew()
    identity, (batch_id, ids) = identity_of(first), a_batch(first)
    first.dispose()
    second = upgraded_postgresql.renew()
    assert identity_of(second) != identity
    with second.read() as session:
        assert session.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 0
    assert a_batch(second) == (batch_id, ids), "numbers begin anew"
    second.dispose()


def create_a_table(connection: Connection) -> None:
    connection.execute(text("CREATE TABLE stray (n integer)"))


def drop_an_index(connection: Connection) -> None:
    name = inspect(connection).get_indexes("jobs")[0]["name"]
    connection.execute(text(f"DROP INDEX {name}"))


def drop_all(connection: Connection) -> None:
    connection.execute(text("DROP SCHEMA public CASCADE"))


def pretend_to_be_older(connection: Connection) -> None:
    connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))


@pytest.mark.parametrize("change", [create_a_table, drop_an_index, drop_all, pretend_to_be_older])
def test_whatever_a_test_has_changed_is_mended(
    change: Callable[[Connection], None], upgraded_postgresql: UpgradedPostgres, indexes: list[str]
) -> None:
    database = upgraded_postgresql.renew()
    with database.engine.begin() as connection:
        change(connection)
    database.dispose()
    database = upgraded_postgresql.renew()
    with database.engine.begin() as connection:
        assert "stray" not in inspect(connection).get_table_names()
        assert indexes_of(connection) == indexes
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == SCHEMA_HEAD
    database.dispose()


@pytest.fixture
def indexes(upgraded_postgresql: UpgradedPostgres) -> list[str]:
    database = upgraded_postgresql.renew()
    with database.engine.begin() as connection:
        found = indexes_of(connection)
    database.dispose()
    assert found
    return found


def indexes_of(connection: Connection) -> list[str]:
    return sorted(str(index["name"]) for index in inspect(connection).get_indexes("jobs"))


def identity_of(database: Database) -> str:
    with database.read() as session:
        return database_id(session)
