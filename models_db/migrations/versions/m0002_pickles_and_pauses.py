"""jobs may ask for pickles and for devices of more memory; dispatch may pause"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from qbatch.models_db.database_clock import UtcDateTime

revision = "0002"
down_revision = "0001"
oldest_code = "0002"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("allow_pickle", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("above_memory_bytes", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("forgiven_attempt", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.create_table(
        "pauses",
        sa.Column("reason", sa.String(length=100), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("needed_bytes", sa.BigInteger(), nullable=True),
        sa.Column("since", UtcDateTime(), nullable=False),
        sa.Column("until", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("reason", name=op.f("pk_pauses")),
    )
    op.create_index(op.f("ix_jobs_checkpoint_key_state"), "jobs", ["checkpoint_key", "state"])
    op.create_index(op.f("ix_jobs_checkpoint_key_dispatch_id"), "jobs", ["checkpoint_key", "dispatch_id"])
    op.drop_index(op.f("ix_jobs_checkpoint_key"), "jobs")


def downgrade() -> None:
    op.create_index(op.f("ix_jobs_checkpoint_key"), "jobs", ["checkpoint_key"])
    op.drop_index(op.f("ix_jobs_checkpoint_key_dispatch_id"), "jobs")
    op.drop_index(op.f("ix_jobs_checkpoint_key_state"), "jobs")
    op.drop_table("pauses")
    op.drop_column("jobs", "forgiven_attempt")
    op.drop_column("jobs", "above_memory_bytes")
    op.drop_column("jobs", "allow_pickle")
