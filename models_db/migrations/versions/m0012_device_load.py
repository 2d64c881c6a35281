"""how full and how busy a worker's device is"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
oldest_code = "0008"


def upgrade() -> None:
    op.add_column("workers", sa.Column("used_bytes", sa.BigInteger(), nullable=True))
    op.add_column("workers", sa.Column("busy_share", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "busy_share")
    op.drop_column("workers", "used_bytes")
