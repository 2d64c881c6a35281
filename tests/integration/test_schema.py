"""The schema's history leads to exactly the tables that the code speaks of, on both databases."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event, inspect, text

from qbatch.core.errors import DatabaseUnreachable, UsageError
from qbatch.models_db.schema import alembic_config, ensure, upgrade
from qbatch.models_db.session import SCHEMA_HEAD, Database
from qbatch.models_db.tables import Base
from tests.migrating import downgrade_to
from tests.rows import a_batch, bundle, states
from tests.waiting import until


def tables(database: Database) -> set[str]:
    with database.engine.connect() as connection:
        return set(inspect(connection).get_table_names())


def test_the_head_is_what_alembic_says_it_is() -> None:
    assert ScriptDirectory.from_config(alembic_config()).get_current_head() == SCHEMA_HEAD


def test_the_migrations_make_the_tables_that_the_code_speaks_of(database: Database) -> None:
    on_postgresql = database.engine.dialect.name == "postgresql"

    def is_compared(_item: object, name: str | None, *_: object) -> bool:
        return not on_postgresql or name != "ix_jobs_baselines"

    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "include_object": is_compared})
        assert compare_metadata(context, Base.metadata) == []
        if on_postgresql:
            said = connection.scalar(text("SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_jobs_baselines'"))
            assert "(batch_id, substr(location, 1, 200)) WHERE" in said, "a whole path may be too long"


def test_an_upgrade_of_what_is_up_to_date_changes_nothing(database: Database) -> None:
    _, ids = a_batch(database)
    upgrade(database)
    assert database.schema_version() == SCHEMA_HEAD
    assert list(states(database)) == ids


def test_an_index_refuses_no_path(database: Database) -> None:
    """PostgreSQL's usual indexes take 2,700 bytes at most."""
    path = "/".join(secrets.token_hex(100) for _ in range(20))
    _, ids = a_batch(database, bundle(f"/{path}"))
    assert list(states(database)) == ids


def test_down_to_nothing_and_up_again(database: Database) -> None:
    downgrade_to(database, "base")
    assert tables(database) == {"alembic_version"}
    assert database.schema_version() is None
    upgrade(database)
    assert tables(database) == {"alembic_version", *Base.metadata.tables}


def test_two_upgrades_at_once_both_end_well(database: Database) -> None:
    downgrade_to(database, "base")
    failures: list[BaseException] = []
    start = threading.Barrier(2)

    def run() -> None:
        # An upgrade of its own engine, as another process would be.
        other = Database(database.engine.url.render_as_string(hide_password=False))
        try:
            start.wait()
            upgrade(other)
        except BaseException as error:
            failures.append(error)
        finally:
            other.dispose()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    database.require_schema()


def test_an_upgrade_that_deadlocks_with_a_worker_is_begun_again(postgresql_database: Database) -> None:
    """The worker records a checkpoint, and then wants the jobs; the migrations have these, and then want the former."""
    database = postgresql_database
    downgrade_to(database, "0014")
    holds, undone = threading.Event(), list[int]()
    event.listen(database.engine, "rollback", lambda _: undone.append(1))

    def work() -> None:
        engine = create_engine(database.engine.url)
        with engine.connect() as worker:
            # It has waited for longer when the circle closes, and must not be the one that ends it.
            worker.execute(text("SET LOCAL deadlock_timeout = '60s'"))
            worker.execute(text("LOCK TABLE checkpoints IN ROW EXCLUSIVE MODE"))
            holds.set()
            until(lambda: worker.execute(_LOCKED_BY_MIGRATIONS).scalar_one(), "migrations at the jobs")
            assert worker.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 0
            worker.commit()
        engine.dispose()

    thread = threading.Thread(target=work)
    thread.start()
    assert holds.wait(60.0)
    upgrade(database)
    thread.join()
    assert undone == [1]
    assert database.schema_version() == SCHEMA_HEAD


_LOCKED_BY_MIGRATIONS = text(
    "SELECT count(*) FROM pg_locks WHERE relation = 'jobs'::regclass AND mode = 'AccessExclusiveLock' AND granted"
)


def test_a_role_that_may_read_the_view_may_read_it_after_an_upgrade(postgresql_database: Database) -> None:
    downgrade_to(postgresql_database, "0018")
    may_read = text("SELECT has_table_privilege('a_reader', 'result_rows', 'SELECT')")
    with postgresql_database.engine.begin() as connection:
        connection.execute(text("CREATE ROLE a_reader"))
        connection.execute(text("GRANT SELECT ON result_rows TO a_reader"))
    upgrade(postgresql_database)
    with postgresql_database.engine.begin() as connection:
        assert connection.scalar(may_read)
        connection.execute(text("DROP OWNED BY a_reader"))
        connection.execute(text("DROP ROLE a_reader"))


def test_a_schema_that_is_not_this_versions_says_what_to_run(database: Database) -> None:
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    with pytest.raises(DatabaseUnreachable, match=f"has schema 0000, .* needs {SCHEMA_HEAD}: run `qbatch db upgrade`"):
        database.require_schema()


def test_ensure_makes_a_sqlite_database_and_its_folder(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'new' / 'home' / 'qbatch.db'}")
    assert database.schema_version() is None
    assert not (tmp_path / "new").exists(), "to ask is not to make"
    ensure(database)
    ensure(database)
    database.require_schema()
    database.dispose()


def test_ensure_leaves_an_empty_postgresql_to_its_owner(postgresql_database: Database) -> None:
    downgrade_to(postgresql_database, "base")
    with pytest.raises(DatabaseUnreachable, match="has schema none"):
        ensure(postgresql_database)
    assert tables(postgresql_database) == {"alembic_version"}


def test_a_postgresql_that_does_not_answer_is_named_without_its_password() -> None:
    database = Database("postgresql://me:hunter2@127.0.0.1:1/qbatch")
    with pytest.raises(DatabaseUnreachable, match=r"127\.0\.0\.1:1") as caught:
        ensure(database)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["mysql://me:hunter2@db/qbatch", "hunter2", "", "sqlite"])
def test_an_unknown_database_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Database(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true", "sqlite://host/x.db"),
        *("sqlite:////{folder}/x.db?mode=ro", "sqlite:////{folder}/x.db?mode=memory&uri=true", "sqlite:////x%00.db"),
        *("sqlite:///file:{folder}/x.db?mode=ro&uri=true", "sqlite:////{folder}/x.db?immutable=1"),
        *("sqlite:////{folder}/x.db?timeout=soon", "sqlite:////{folder}/x.db?isolation_level=IMMEDIATE"),
    ],
)
def test_a_sqlite_that_is_no_plain_file_is_refused(url: str, tmp_path: Path) -> None:
    """Kept in memory, jobs are forgotten with the process that stored them."""
    with pytest.raises(UsageError, match="QBATCH_DATABASE_URL"):
        Database(url.format(folder=str(tmp_path).removeprefix("/")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"no database, but more than a hundred bytes\n" * 9, b"SQLite format 3\0" + b"x" * 999]
)
def test_a_file_that_is_no_database_is_named_and_left_alone(content: bytes, tmp_path: Path) -> None:
    place = tmp_path / "notes.txt"
    place.write_bytes(content)
    database = Database(f"sqlite:///{place}")
    for ask in (ensure, Database.require_schema):
        with pytest.raises(DatabaseUnreachable, match=r"notes\.txt"):
            ask(database)
    assert place.read_bytes() == content
    database.dispose()
