"""A database that is deleted or replaced under those who work on it: they notice at once, and make no other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from qbatch.core.errors import DatabaseReplaced
from qbatch.core.settings import Settings
from qbatch.models_db.schema import ensure, upgrade
from qbatch.models_db.session import Database
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.loop import Scheduler
from qbatch.scheduler.stop import Stop
from tests.rows import a_batch


def delete(file: Path) -> None:
    file.unlink()


def delete_folder(file: Path) -> None:
    shutil.rmtree(file.parent)


def replace(file: Path) -> None:
    other = Database(f"sqlite:///{file.with_name('other.db')}")
    upgrade(other)
    other.dispose()
    file.with_name("other.db").replace(file)


def overwrite(file: Path) -> None:
    """As ``cp`` does: the file is the same one, with another's content."""
    other = Database(f"sqlite:///{file.with_name('other.db')}")
    upgrade(other)
    other.dispose()
    for end in ("-wal", "-shm"):
        file.with_name(f"{file.name}{end}").unlink(missing_ok=True)
    shutil.copyfile(file.with_name("other.db"), file)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def database(home: Path) -> Database:
    database = Database(f"sqlite:///{home / 'qbatch.db'}")
    ensure(database)
    return database


@pytest.mark.parametrize("harm", [delete, delete_folder, replace])
def test_whoever_asks_is_told(database: Database, home: Path, harm: Callable[[Path], None]) -> None:
    a_batch(database)
    harm(home / "qbatch.db")
    there = (home / "qbatch.db").exists()
    for ask in (lambda: a_batch(database), database.schema, lambda: ensure(database), database.require_schema):
        with pytest.raises(DatabaseReplaced, match=r"qbatch\.db was (deleted|replaced)"):
            ask()
    assert (home / "qbatch.db").exists() == there, "none is made in its place"
    database.dispose()


def test_one_that_is_put_back_is_the_same(database: Database, home: Path) -> None:
    (home / "qbatch.db").rename(home / "elsewhere.db")
    with pytest.raises(DatabaseReplaced):
        a_batch(database)
    (home / "elsewhere.db").rename(home / "qbatch.db")
    a_batch(database)
    database.dispose()


@pytest.mark.parametrize("harm", [delete, replace, overwrite])
def test_a_scheduler_stops(database: Database, home: Path, harm: Callable[[Path], None]) -> None:
    settings = Settings(home=home, storage=home, cache=home, broker_url="redis://127.0.0.1:1/0")
    scheduler = Scheduler(database, Broker(settings), settings)
    scheduler.tick()
    if harm is overwrite:
        database.engine.dispose()
    harm(home / "qbatch.db")
    with pytest.raises(DatabaseReplaced):
        scheduler.run(Stop())
    database.dispose()


def test_a_postgresql_in_whose_place_another_was_made_is_not_worked_on(postgresql_database: Database) -> None:
    database = postgresql_database
    database.require_schema()
    other = Database(database.engine.url.render_as_string(hide_password=False))
    with database.engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    upgrade(other)
    other.dispose()
    with pytest.raises(DatabaseReplaced, match="was replaced by another one"):
        database.require_schema()
