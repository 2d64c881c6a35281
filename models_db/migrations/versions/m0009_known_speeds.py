"""by which results another job of the batch may find a speed that it need not measure again"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
oldest_code = "0008"


def upgrade() -> None:
    op.add_column("results", sa.Column("speed_key", sa.String(64), nullable=True))
    op.create_index(op.f("ix_results_speed_key"), "results", ["speed_key"])


def downgrade() -> None:
    op.drop_index(op.f("ix_results_speed_key"), "results")
    op.drop_column("results", "speed_key")
