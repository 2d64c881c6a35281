"""A newer version's migrations run under the fleet: some that it works on beside, and some that it must leave."""

from __future__ import annotations

import threading

from sqlalchemy import text

from qbatch.models_db.session import SCHEMA_HEAD
from tests.chaos.faults.base import ExposedFleet, Kind
from tests.migrating import NOT_NULL, migrate

# Alembic keeps what it is at in module globals, and stacks are threads.
_ALEMBIC = threading.Lock()


def _grow(fleet: ExposedFleet) -> str | None:
    """A nullable column or an index more, whose migration says that today's code works with it. It stays."""
    if fleet.is_foreign:
        return None
    version = _next(fleet)
    added = fleet.rng.choice(
        (
            f'op.create_index("ix_jobs_of_{version}", "jobs", ["model"])',
            f'op.add_column("results", sa.Column("of_{version}", sa.Integer(), nullable=True))',
        )
    )
    _migrate(fleet, SCHEMA_HEAD, added)
    return f"{version}, {added}"


def _change(fleet: ExposedFleet) -> str | None:
    """A column that today's code does not fill, until the operator rolls back: everyone leaves, and comes back."""
    if fleet.is_foreign:
        return None
    version, before = _next(fleet), fleet.database.schema_version()
    seconds = fleet.settings.lease_s * fleet.rng.uniform(0.5, 2.0)
    _migrate(fleet, version, NOT_NULL)

    def roll_back() -> None:
        with fleet.write() as session:
            session.execute(text("ALTER TABLE results DROP COLUMN of_tomorrow"))
            session.execute(text("DELETE FROM schema_versions WHERE version = :version"), {"version": version})
            session.execute(text("UPDATE alembic_version SET version_num = :before"), {"before": before})
        fleet.migrations.pop()

    fleet.be_foreign(seconds, roll_back)
    return f"{version} for {seconds:.1f} s"


def _next(fleet: ExposedFleet) -> str:
    return f"{int(SCHEMA_HEAD) + len(fleet.migrations) + 1:04}"


def _migrate(fleet: ExposedFleet, oldest_code: str, body: str) -> None:
    fleet.migrations.append((oldest_code, body))
    fleet.wake(all_=True)
    with _ALEMBIC:
        migrate(fleet.database, fleet.settings.home.parent / "tomorrow", *fleet.migrations)


KINDS: tuple[Kind, ...] = (
    Kind(name="schema grows", weight=3, is_kill=False, deal=_grow),
    Kind(name="schema changed, rolled back", weight=3, is_kill=False, deal=_change),
)
