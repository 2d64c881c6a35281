"""What every test may use: real databases and a real Redis, started by the tests that need them."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

os.environ["HF_HUB_OFFLINE"] = "1"
# Many processes share the cores, and the models are tiny: what two threads of each gain, waiting for one another loses
# several times over. Runners inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.models_db.tables import DatabaseIdentity
from tests.postgres import Postgres, UpgradedPostgres

_TESTS = Path(__file__).parent
# The dearest folders first: a long file that starts last, everybody waits for.
_ORDER = ("chaos", "faults", "acceptance", "gpu", "loaders", "integration", "unit")
# Of whole processes, which start for seconds and wait for leases to run out.
_SLOW = frozenset({"chaos", "faults", "acceptance"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _ORDER.index(_folder(item)))
    for item in items:
        if _folder(item) == "loaders":
            item.add_marker(pytest.mark.loaders)
        if _folder(item) in _SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """All is imported: what stays for good need not be looked through whenever garbage is collected."""
    gc.freeze()
    gc.enable()


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(_TESTS).parts[0]


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


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the migrations make of an empty file, for each test to copy."""
    file = tmp_path_factory.mktemp("migrated") / "qbatch.db"
    database = Database(f"sqlite:///{file}")
    upgrade(database)
    database.dispose()
    return file


@pytest.fixture
def sqlite_database(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Database]:
    shutil.copy(migrated_sqlite, tmp_path / "qbatch.db")
    database = Database(f"sqlite:///{tmp_path / 'qbatch.db'}")
    with database.write() as session:
        session.execute(update(DatabaseIdentity).values(id=str(uuid.uuid4())))
    yield database
    database.dispose()


@pytest.fixture(scope="session")
def upgraded_postgresql(postgresql_url: str) -> UpgradedPostgres:
    return UpgradedPostgres(postgresql_url)


@pytest.fixture
def postgresql_database(upgraded_postgresql: UpgradedPostgres) -> Iterator[Database]:
    database = upgraded_postgresql.renew()
    yield database
    database.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """Each test that asks for a database runs on both."""
    chosen: Database = request.getfixturevalue(f"{request.param}_database")
    return chosen
