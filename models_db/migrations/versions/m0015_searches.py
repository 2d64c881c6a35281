"""searches for the layers to keep at 16 bits, and the jobs that publish what they found

An older worker would quantize where it is asked to search.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from qbatch.models_db.database_clock import UtcDateTime

revision = "0015"
down_revision = "0014"
oldest_code = "0015"

_WAITING = "ix_jobs_waiting"
_COLUMNS = ["priority", "batch_id", "id", "device", "above_memory_bytes"]
_BEFORE = "state = 'queued' AND dispatch_id IS NULL"
_NOW = "state = 'queued' AND search_id IS NULL AND dispatch_id IS NULL"
_REFERENCES = ("search_id", "search_job_id", "point")


def upgrade() -> None:
    op.create_table(
        "searches",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=True),
        sa.Column("sensitivity", sa.JSON(), nullable=False),
        sa.Column("frontier", sa.JSON(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("device_name", sa.String(200), nullable=False),
        sa.Column("created_at", UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_searches_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_searches")),
    )
    op.create_index(op.f("ix_searches_key"), "searches", ["key"])
    op.create_index(op.f("ix_searches_job_id"), "searches", ["job_id"])
    op.add_column("jobs", sa.Column("search", sa.JSON(), nullable=True))
    for name in _REFERENCES:
        op.add_column("jobs", sa.Column(name, sa.Integer(), nullable=True))
    _create("ix_jobs_search_id", ["search_id"], "search_id IS NOT NULL")
    _create("ix_jobs_points", ["search_job_id", "point"], "search_job_id IS NOT NULL", unique=True)
    op.drop_index(_WAITING, "jobs")
    _create(_WAITING, _COLUMNS, _NOW)


def downgrade() -> None:
    for name in (_WAITING, "ix_jobs_points", "ix_jobs_search_id"):
        op.drop_index(name, "jobs")
    for column in (*_REFERENCES, "search"):
        op.drop_column("jobs", column)
    _create(_WAITING, _COLUMNS, _BEFORE)
    op.drop_table("searches")


def _create(name: str, columns: list[str], condition: str, *, unique: bool = False) -> None:
    """Over few jobs. A query with the state in this form uses this index, and no other one that begins with it."""
    on_sqlite = sa.text(condition.replace("state", "+state"))
    on_postgresql = sa.text(condition.replace("state", "(state || '')"))
    op.create_index(name, "jobs", columns, unique=unique, sqlite_where=on_sqlite, postgresql_where=on_postgresql)
