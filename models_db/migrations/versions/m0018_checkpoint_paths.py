"""an index of checkpoints' paths: what removes one looks for it by its path, and read all of them for that"""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0017"
oldest_code = "0008"

_INDEX = "ix_checkpoints_path"


def upgrade() -> None:
    op.create_index(_INDEX, "checkpoints", ["path"])


def downgrade() -> None:
    op.drop_index(_INDEX, "checkpoints")
