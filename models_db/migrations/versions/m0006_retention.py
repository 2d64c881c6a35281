"""a checkpoint may outlive the job that wrote it; what refers to a job is found without looking at every row"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
oldest_code = "0006"


def upgrade() -> None:
    with op.batch_alter_table("checkpoints") as checkpoints:
        checkpoints.alter_column("job_id", existing_type=sa.Integer(), nullable=True)
    op.create_index(op.f("ix_checkpoints_job_id"), "checkpoints", ["job_id"])
    op.create_index(op.f("ix_jobs_reused_from"), "jobs", ["reused_from"])
    op.create_index(op.f("ix_jobs_batch_id_state"), "jobs", ["batch_id", "state"])
    op.drop_index(op.f("ix_jobs_batch_id"), "jobs")


def downgrade() -> None:
    op.create_index(op.f("ix_jobs_batch_id"), "jobs", ["batch_id"])
    op.drop_index(op.f("ix_jobs_batch_id_state"), "jobs")
    op.drop_index(op.f("ix_jobs_reused_from"), "jobs")
    op.drop_index(op.f("ix_checkpoints_job_id"), "checkpoints")
    op.execute("DELETE FROM checkpoints WHERE job_id IS NULL")
    with op.batch_alter_table("checkpoints") as checkpoints:
        checkpoints.alter_column("job_id", existing_type=sa.Integer(), nullable=False)
