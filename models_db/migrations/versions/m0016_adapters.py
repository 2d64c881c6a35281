"""which adapter a job has, and the checkpoint that it belongs to"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
oldest_code = "0008"

_INDEX = "ix_jobs_base_key"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("base_key", sa.String(64), nullable=True))
    op.add_column("jobs", sa.Column("recovery", sa.String(32), nullable=True))
    has_base = sa.text("base_key IS NOT NULL")
    op.create_index(_INDEX, "jobs", ["base_key", "state"], sqlite_where=has_base, postgresql_where=has_base)


def downgrade() -> None:
    op.drop_index(_INDEX, "jobs")
    op.drop_column("jobs", "recovery")
    op.drop_column("jobs", "base_key")
