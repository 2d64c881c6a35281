"""digests of files; the state in which a checkpoint's files were verified"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from qbatch.models_db.database_clock import UtcDateTime

revision = "0003"
down_revision = "0002"
oldest_code = "0002"


def upgrade() -> None:
    op.create_table(
        "file_digests",
        sa.Column("place", sa.String(length=64), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("version", sa.String(length=150), nullable=False),
        sa.Column("chunk_sha256", sa.JSON(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("hashed_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("place", name=op.f("pk_file_digests")),
    )
    op.add_column("checkpoints", sa.Column("file_versions", sa.JSON(), nullable=True))
    op.add_column("checkpoints", sa.Column("verified_at", UtcDateTime(), nullable=True))


def downgrade() -> None:
    op.drop_column("checkpoints", "verified_at")
    op.drop_column("checkpoints", "file_versions")
    op.drop_table("file_digests")
