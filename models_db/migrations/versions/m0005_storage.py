"""attempts that storage cut short are told apart"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
oldest_code = "0002"


def upgrade() -> None:
    op.add_column("attempts", sa.Column("cut_short", sa.Boolean(), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "cut_short")
