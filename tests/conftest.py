"""What every test may use: real databases and a real Redis, started by the tests that need them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

os.environ["HF_HUB_OFFLINE"] = "1"
# Many processes share the cores: threads that wait should leave them to the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from tests.postgres import Postgres


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A real PostgreSQL of the session's own."""
    server = Postgres()
    yield server.url
    server.close()


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """What a login gives as XDG_RUNTIME_DIR; pytest's own folders have too long a name to hold a socket."""
    folder = Path(tempfile.mkdtemp(prefix="qb-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'qbatch.db'}")
    upgrade(database)
    yield database
    database.dispose()


@pytest.fixture
def postgresql_database(postgresql_url: str) -> Iterator[Database]:
    database = Database(postgresql_url)
    with database.engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    upgrade(database)
    yield database
    database.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """Each test that asks for a database runs on both."""
    chosen: Database = request.getfixturevalue(f"{request.param}_database")
    return chosen
