"""an index of baselines: for each of its rows, the view `result_rows` read all jobs that the model ever had"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from qbatch.models_db.migrations.versions.m0014_result_rows import OF_BATCH_AND_MODEL, select_rows

revision = "0019"
down_revision = "0018"
oldest_code = "0008"

_INDEX, _CONDITION = "ix_jobs_baselines", "method = 'none'"
_SAME = "b.batch_id = j.batch_id AND b.location = j.location"
# PostgreSQL's index takes no path that is longer than 2,700 bytes.
_SAME_BEGINNING = "substr(b.location, 1, 200) = substr(j.location, 1, 200)"


def upgrade() -> None:
    if _is_sqlite():
        op.create_index(_INDEX, "jobs", ["batch_id", "location"], sqlite_where=sa.text(_CONDITION))
        _replace_view(_SAME)
    else:
        beginning = sa.text("substr(location, 1, 200)")
        op.create_index(_INDEX, "jobs", ["batch_id", beginning], postgresql_where=sa.text(_CONDITION))
        _replace_view(f"{_SAME} AND {_SAME_BEGINNING}")


def downgrade() -> None:
    _replace_view(OF_BATCH_AND_MODEL)
    op.drop_index(_INDEX, "jobs")


def _replace_view(is_of_batch_and_model: str) -> None:
    """On PostgreSQL without dropping it, which would take away what roles were granted."""
    if _is_sqlite():
        op.execute("DROP VIEW result_rows")
    word = "CREATE" if _is_sqlite() else "CREATE OR REPLACE"
    op.execute(f"{word} VIEW result_rows AS {select_rows(is_of_batch_and_model)}")


def _is_sqlite() -> bool:
    return bool(op.get_bind().dialect.name == "sqlite")
