"""what is asked often reads only what it shows: jobs of a state, a batch or a model, what waits, any figure's best"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
oldest_code = "0006"

# As names of columns, because a migration must not change when the tables do.
_FIGURES = (
    *("num_parameters", "quantized_fraction", "bits_per_param"),
    *("disk_bytes", "memory_footprint_bytes", "weights_bytes", "max_allocated_bytes"),
    *("load_model_s", "quantize_s", "prefill_s_p50", "decode_tokens_per_s", "per_token_s_p50", "per_token_s_p99"),
    *("forward_s_p50", "forward_samples_per_s", "perplexity", "kl_mean", "top1_agreement"),
)
_REPLACED = (["dispatch_id"], ["state", "dispatch_id"], ["state", "lease_expires_at"], ["batch_id", "state"])
_PARTIAL = (
    ("ix_jobs_dispatched", ["dispatch_id"], "dispatch_id IS NOT NULL"),
    (
        "ix_jobs_waiting",
        ["priority", "batch_id", "id", "device", "above_memory_bytes"],
        "state = 'queued' AND dispatch_id IS NULL",
    ),
    ("ix_jobs_waiting_again", ["attempt", "above_memory_bytes"], "state = 'queued' AND attempt > 0"),
    ("ix_jobs_failed", ["finished_at", "error_kind"], "state = 'failed'"),
)


def upgrade() -> None:
    for columns in (*_REPLACED, ["checkpoint_key", "dispatch_id"]):
        _drop("jobs", columns)
    _create("jobs", ["state", "id"])
    _create("jobs", ["batch_id", "state", "id"])
    op.create_index(_name("jobs", ["location"]), "jobs", ["location"], postgresql_using="hash")
    for name, columns, condition in _PARTIAL:
        # SQLite: a query with a sign before the column uses this index, and none that begins with the column.
        on_sqlite = sa.text(condition.replace("state", "+state"))
        op.create_index(name, "jobs", columns, sqlite_where=on_sqlite, postgresql_where=sa.text(condition))
    for figure in _FIGURES:
        _create("results", [figure])


def downgrade() -> None:
    for figure in _FIGURES:
        _drop("results", [figure])
    for name, _, _ in _PARTIAL:
        op.drop_index(name, "jobs")
    for columns in (["location"], ["batch_id", "state", "id"], ["state", "id"]):
        _drop("jobs", columns)
    for columns in (*_REPLACED, ["checkpoint_key", "dispatch_id"]):
        _create("jobs", columns)


def _create(table: str, columns: list[str]) -> None:
    op.create_index(_name(table, columns), table, columns)


def _drop(table: str, columns: list[str]) -> None:
    op.drop_index(_name(table, columns), table)


def _name(table: str, columns: list[str]) -> str:
    name: str = op.f(f"ix_{table}_{'_'.join(columns)}")
    return name
