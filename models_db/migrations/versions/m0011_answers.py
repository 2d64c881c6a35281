"""how each question of a task was answered, so that two models can be compared question by question"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
oldest_code = "0008"


def upgrade() -> None:
    op.create_table(
        "answers",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("answers", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["results.job_id"], name=op.f("fk_answers_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "task", name=op.f("pk_answers")),
    )


def downgrade() -> None:
    op.drop_table("answers")
