"""batches that are still being stored, which no older version would know to leave alone; results by their time"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from qbatch.models_db.database_clock import UtcDateTime

revision = "0008"
down_revision = "0007"
oldest_code = "0008"


def upgrade() -> None:
    op.create_table(
        "arrivals",
        sa.Column("batch_id", sa.Integer(), nullable=False),
        sa.Column("seen_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("abandoned", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_arrivals_batch_id")),
        sa.PrimaryKeyConstraint("batch_id", name=op.f("pk_arrivals")),
    )
    op.create_index(op.f("ix_results_created_at"), "results", ["created_at"])


def downgrade() -> None:
    op.drop_index(op.f("ix_results_created_at"), "results")
    op.execute("DELETE FROM jobs WHERE batch_id IN (SELECT batch_id FROM arrivals)")
    op.drop_table("arrivals")
