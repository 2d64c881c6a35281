"""A database at the schema of another version: of an earlier one, or of a later one whose migrations run as it will."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import text
from sqlalchemy.orm import Session

from qbatch.models_db.schema import alembic_config
from qbatch.models_db.session import SCHEMA_HEAD, Database
from qbatch.models_db.tables import Base

NEXT = f"{int(SCHEMA_HEAD) + 1:04}"
AFTER_NEXT = f"{int(SCHEMA_HEAD) + 2:04}"
INDEX = 'op.create_index("ix_jobs_of_tomorrow", "jobs", ["model"])'
NULLABLE = 'op.add_column("results", sa.Column("of_tomorrow", sa.Integer(), nullable=True))'
# PostgreSQL fills what stands there; SQLite takes such a column with a default alone, and then the table is made anew.
NOT_NULL = """
    with op.batch_alter_table("results") as results:
        results.add_column(sa.Column("of_tomorrow", sa.Integer(), nullable=False, server_default="0"))
    with op.batch_alter_table("results") as results:
        results.alter_column("of_tomorrow", server_default=None)
"""


def migrate(database: Database, folder: Path, *migrations: tuple[str, str]) -> None:
    """Upgrade to a version that has these further migrations: (oldest code, body) each."""
    scripts = folder / "migrations"
    if not scripts.exists():
        shutil.copytree(Path(alembic_config().get_main_option("script_location") or ""), scripts)
    before = SCHEMA_HEAD
    for oldest_code, body in migrations:
        revision = f"{int(before) + 1:04}"
        (scripts / "versions" / f"m{revision}_tomorrow.py").write_text(
            "import sqlalchemy as sa\nfrom alembic import op\n"
            f"revision, down_revision, oldest_code = {revision!r}, {before!r}, {oldest_code!r}\n"
            f"def upgrade():\n    {body.strip()}\n"
        )
        before = revision
    config = alembic_config()
    config.set_main_option("script_location", str(scripts))
    _move(database, command.upgrade, "head", config)


def upgrade_to(database: Database, revision: str) -> None:
    _move(database, command.upgrade, revision, alembic_config())


def downgrade_to(database: Database, revision: str) -> None:
    _move(database, command.downgrade, revision, alembic_config())


def _move(database: Database, move: Callable[[Config, str], None], revision: str, config: Config) -> None:
    with database.write() as session:
        config.attributes["connection"] = session.connection()
        move(config, revision)


def fill_the_new_column(session: Session) -> None:
    """Take ``NOT_NULL`` back, as far as results are concerned: the newer version's code would fill that column."""
    for what in ("VIEW result_rows", "TABLE answers", "TABLE results"):
        session.execute(text(f"DROP {what}"))
    for table in ("results", "answers"):
        Base.metadata.tables[table].create(session.connection())
    session.execute(text("UPDATE alembic_version SET version_num = :head"), {"head": SCHEMA_HEAD})
