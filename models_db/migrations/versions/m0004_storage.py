"""attempts that storage cut short are told apart; a database has an id of its own"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("attempts", sa.Column("cut_short", sa.Boolean(), nullable=True))
    op.create_table(
        "database_id",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("value", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_database_id")),
    )


def downgrade() -> None:
    op.drop_table("database_id")
    op.drop_column("attempts", "cut_short")
