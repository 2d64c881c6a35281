"""since when a checkpoint is no longer on the storage"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from qbatch.models_db.database_clock import UtcDateTime

revision = "0013"
down_revision = "0012"
oldest_code = "0008"

_INDEX = "ix_checkpoints_gone"


def upgrade() -> None:
    op.add_column("checkpoints", sa.Column("gone_at", UtcDateTime(timezone=True), nullable=True))
    is_gone = sa.text("gone_at IS NOT NULL")
    op.create_index(_INDEX, "checkpoints", ["key"], sqlite_where=is_gone, postgresql_where=is_gone)


def downgrade() -> None:
    op.drop_index(_INDEX, "checkpoints")
    op.drop_column("checkpoints", "gone_at")
