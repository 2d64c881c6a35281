"""what a skip list means for a model, once a worker has found it out"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from qbatch.models_db.database_clock import UtcDateTime

revision = "0010"
down_revision = "0009"
oldest_code = "0008"


def upgrade() -> None:
    op.create_table(
        "skip_list_keys",
        sa.Column("spelled", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("settled_at", UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("spelled", name=op.f("pk_skip_list_keys")),
    )


def downgrade() -> None:
    op.drop_table("skip_list_keys")
