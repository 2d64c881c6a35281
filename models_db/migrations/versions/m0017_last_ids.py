"""the last id of batches and jobs, so that SQLite gives none a second time

SQLite gives a new row the id after the highest that is there, so the ids of a removed newest batch and of its jobs came
back. PostgreSQL's sequences never give one again, so the table is empty there.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
oldest_code = "0008"


def upgrade() -> None:
    op.create_table(
        "last_ids",
        sa.Column("table_name", sa.String(32), nullable=False),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("table_name", name=op.f("pk_last_ids")),
    )
    if op.get_bind().dialect.name == "sqlite":
        op.execute("INSERT INTO last_ids SELECT 'batches', coalesce(max(id), 0) FROM batches")
        op.execute("INSERT INTO last_ids SELECT 'jobs', coalesce(max(id), 0) FROM jobs")


def downgrade() -> None:
    op.drop_table("last_ids")
