"""A schema that a newer version made: what it says it puts up with goes on, anything else is refused in one line."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, text

from qbatch.core.errors import DatabaseRefused, ForeignSchema
from qbatch.models_db import jobs
from qbatch.models_db.migrations import versions
from qbatch.models_db.schema import ensure, upgrade
from qbatch.models_db.schema_fit import explain
from qbatch.models_db.session import SCHEMA_HEAD, Database
from tests.acceptance.conftest import Qbatch
from tests.migrating import AFTER_NEXT, INDEX, NEXT, NOT_NULL, NULLABLE, downgrade_to, migrate, upgrade_to
from tests.rows import a_batch, a_worker, claim, states, succeed

MIGRATIONS = sorted(module.name for module in pkgutil.iter_modules(versions.__path__))


@pytest.mark.parametrize("added", [INDEX, NULLABLE, 'op.create_table("t", sa.Column("id", sa.Integer()))'])
def test_a_migration_that_only_adds_is_tolerated_by_the_version_before(
    database: Database, tmp_path: Path, added: str
) -> None:
    _, ids = a_batch(database)
    worker = a_worker(database)
    migrate(database, tmp_path, (SCHEMA_HEAD, added))
    assert database.schema_version() == NEXT
    database.require_schema()
    assert not database.is_behind()
    for token in claim(database, ids, worker):
        assert succeed(database, token)
    assert set(states(database).values()) == {"succeeded"}


@pytest.mark.parametrize(
    ("migrations", "at"),
    [
        ([(NEXT, NOT_NULL)], NEXT),
        ([(SCHEMA_HEAD, INDEX), (NEXT, NULLABLE)], AFTER_NEXT),
        ([(NEXT, NULLABLE), (SCHEMA_HEAD, INDEX)], AFTER_NEXT),
    ],
    ids=["one that changes", "the second wants the first's code", "the first changed, the second only adds"],
)
def test_any_other_is_refused_in_one_line_that_says_which_is_newer(
    database: Database, tmp_path: Path, migrations: list[tuple[str, str]], at: str
) -> None:
    migrate(database, tmp_path, *migrations)
    for ask in (database.require_schema, database.is_behind, lambda: ensure(database), lambda: upgrade(database)):
        with pytest.raises(ForeignSchema) as caught:
            ask()
        said = str(caught.value)
        assert f"has schema {at} of a newer qbatch; this one knows {SCHEMA_HEAD}" in said
        assert "update qbatch" in said
        assert "\n" not in said
    assert database.schema_version() == at


def test_a_version_that_no_migration_tells_of_is_refused(database: Database) -> None:
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ForeignSchema, match="has schema 9999"):
        database.require_schema()


def test_an_upgrade_to_an_older_version_than_the_database_s_is_none(database: Database, tmp_path: Path) -> None:
    migrate(database, tmp_path, (SCHEMA_HEAD, INDEX))
    upgrade(database)
    ensure(database)
    assert database.schema_version() == NEXT


def test_an_upgrade_that_is_taken_back_is_forgotten(database: Database, tmp_path: Path) -> None:
    _to(database, "base")
    upgrade(database)
    assert max(database.schema().oldest_code) == SCHEMA_HEAD
    migrate(database, tmp_path, (SCHEMA_HEAD, INDEX))
    assert database.schema().oldest_code[NEXT] == SCHEMA_HEAD


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE attempts DROP COLUMN message",
        "ALTER TABLE attempts ADD COLUMN site INTEGER",
        "ALTER TABLE attempts RENAME COLUMN outcome TO how_it_ended",
    ],
)
def test_a_schema_that_was_changed_by_hand_is_told_by_its_columns(postgresql_database: Database, change: str) -> None:
    database = postgresql_database
    _, ids = a_batch(database)
    worker = a_worker(database)
    with database.engine.begin() as connection:
        connection.execute(text(change))
        if "ADD" in change:
            connection.execute(text("ALTER TABLE attempts ALTER COLUMN site SET NOT NULL"))
    with pytest.raises(DatabaseRefused) as refused:
        claim(database, ids, worker)
    found = explain(database, refused.value)
    assert isinstance(found, ForeignSchema)
    assert "attempts" in str(found)


def test_a_refusal_of_what_was_asked_is_no_change_of_the_schema(database: Database) -> None:
    with pytest.raises(DatabaseRefused, match="refused a statement") as refused, database.write() as session:
        session.execute(text("INSERT INTO leases (name) VALUES ('x')"))
    assert explain(database, refused.value) is refused.value


def test_a_column_that_sqlite_misses_is_a_refusal_and_a_table_is_an_outage(sqlite_database: Database) -> None:
    _, ids = a_batch(sqlite_database)
    worker = a_worker(sqlite_database)
    with sqlite_database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE attempts RENAME COLUMN message TO said"))
    with pytest.raises(DatabaseRefused) as refused:
        claim(sqlite_database, ids, worker)
    assert isinstance(explain(sqlite_database, refused.value), ForeignSchema)


COMMANDS = [["status"], ["db", "upgrade"], ["wait", "b1"], ["scheduler"], ["worker", "--cpu"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_refuses_in_one_line(database: Database, tmp_path: Path, command: list[str]) -> None:
    migrate(database, tmp_path, (NEXT, NOT_NULL))
    url = database.engine.url.render_as_string(hide_password=False)
    qbatch = Qbatch(tmp_path / "home", {"QBATCH_DATABASE_URL": url, "QBATCH_BROKER_URL": "redis://127.0.0.1:1/0"})
    said = qbatch(*command, code=3).stderr.splitlines()[-1]
    assert f"has schema {NEXT} of a newer qbatch; this one knows {SCHEMA_HEAD}" in said


# What a migration says of itself


@pytest.mark.parametrize("name", MIGRATIONS)
def test_each_migration_says_which_code_works_with_what_it_leaves(name: str) -> None:
    module = importlib.import_module(f"qbatch.models_db.migrations.versions.{name}")
    assert module.oldest_code <= module.revision
    assert len(module.oldest_code) == len(module.revision) == 4


@pytest.mark.parametrize("name", MIGRATIONS)
def test_one_that_says_that_older_code_works_only_adds(database: Database, name: str) -> None:
    module: Any = importlib.import_module(f"qbatch.models_db.migrations.versions.{name}")
    if module.oldest_code == module.revision:
        return
    _to(database, "base")
    _to(database, module.down_revision)
    before = _shape(database)
    _to(database, module.revision)
    after = _shape(database)
    for table, columns in before.items():
        assert columns.items() <= after[table].items(), f"{table}: what was there stays as it was"
        for added in after[table].keys() - columns.keys():
            assert after[table][added] == "nullable", f"{table}: {added}"


def _to(database: Database, revision: str) -> None:
    (downgrade_to if revision == "base" else upgrade_to)(database, revision)


def _shape(database: Database) -> dict[str, Mapping[str, str]]:
    """By table: each column with its type, or ``nullable`` where one may leave it out; each unique constraint."""
    with database.engine.connect() as connection:
        found = inspect(connection)
        return {
            table: {c["name"]: "nullable" if c["nullable"] else str(c["type"]) for c in found.get_columns(table)}
            | {f"unique {constraint['column_names']}": "unique" for constraint in found.get_unique_constraints(table)}
            for table in found.get_table_names()
            if table != "alembic_version"
        }


def test_a_job_that_is_cancelled_while_the_schema_is_newer_is_cancelled(database: Database, tmp_path: Path) -> None:
    """The command line of the version before works as its workers do."""
    _, ids = a_batch(database)
    migrate(database, tmp_path, (SCHEMA_HEAD, NULLABLE))
    with database.write() as session:
        database.require_own(session)
        assert jobs.cancel(session, job_ids=ids) == ids
