"""a view with a row for each job, as ``results --json`` shows it, for people who bring their own tools

A migration that changes or drops a column that the view reads must drop the view first and make it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from alembic import op

revision = "0014"
down_revision = "0013"
oldest_code = "0008"

_FIGURES = (
    *("num_parameters", "quantized_fraction", "bits_per_param", "disk_bytes", "memory_footprint_bytes"),
    *("weights_bytes", "max_allocated_bytes", "load_model_s", "quantize_s", "prefill_s_p50", "decode_tokens_per_s"),
    *("per_token_s_p50", "per_token_s_p99", "forward_s_p50", "forward_samples_per_s", "perplexity", "kl_mean"),
    "top1_agreement",
)


# No dataclass, which needs its module in sys.modules: Alembic does not put it there.
class _Words(NamedTuple):
    """A database's own words. ``value``: of a JSON column, what is at a path, or NULL. ``same``: compares NULLs too."""

    value: Callable[..., str]
    options: str
    double_quant: str
    same: str
    same_protocol: str

    def number(self, column: str, *path: str) -> str:
        return _double(self.value(column, *path))


_SQLITE = _Words(
    value=lambda column, *path: f"json_extract({column}, '$.{'.'.join(path)}')",
    options="json_remove(j.scheme, '$.method')",
    double_quant="COALESCE(json_extract(j.scheme, '$.double_quant'), 0)",
    same="IS",
    same_protocol="b.protocol = j.protocol",
)
_POSTGRESQL = _Words(
    value=lambda column, *path: f"({column} #>> '{{{','.join(path)}}}')",
    options="(j.scheme::jsonb - 'method')",
    double_quant="COALESCE(CAST(j.scheme ->> 'double_quant' AS BOOLEAN), FALSE)",
    same="IS NOT DISTINCT FROM",
    same_protocol="b.protocol::jsonb = j.protocol::jsonb",
)
_GONE = "SELECT c.path FROM checkpoints AS c WHERE c.gone_at IS NOT NULL"
# What stands before the last "+": the checkpoint that an adapter belongs to. Empty for other paths.
_BASE_PATH = "rtrim(rtrim(r.checkpoint_path, replace(r.checkpoint_path, '+', '')), '+')"
# By the model: a batch may have many jobs, and + 0 keeps its index out of the search.
OF_BATCH_AND_MODEL = "b.location = j.location AND b.batch_id + 0 = j.batch_id"


def _double(value: str) -> str:
    return f"CAST({value} AS DOUBLE PRECISION)"


def upgrade() -> None:
    op.execute(f"CREATE VIEW result_rows AS {select_rows(OF_BATCH_AND_MODEL)}")


def downgrade() -> None:
    op.execute("DROP VIEW result_rows")


def _ratio(name: str, condition: str) -> str:
    quotient = f"{_double(f'r.{name}')} / NULLIF(br.{name}, 0)"
    return f"CASE WHEN {condition} AND br.job_id <> r.job_id THEN {quotient} END AS {name}_ratio"


def select_rows(is_of_batch_and_model: str) -> str:
    """The query of the view. ``is_of_batch_and_model``: the condition by which a job's baseline ``b`` is found."""
    words = _SQLITE if op.get_bind().dialect.name == "sqlite" else _POSTGRESQL
    step_s = words.number("r.details", "why", "kernels_alone", "step_s")
    batch_size = (
        f"COALESCE(NULLIF({words.number('r.details', 'shapes', 'batch_size')}, 0), "
        f"{words.number('r.protocol', 'batch_size')})"
    )
    contents = f" {words.same} ".join(words.value(f"{of}.details", "fingerprint") for of in ("r", "br"))
    is_comparable = f"r.protocol_hash = br.protocol_hash AND {contents}"
    on_device = f"{is_comparable} AND r.device_name = br.device_name"
    figures = ", ".join(f"r.{name} AS {name}" for name in _FIGURES)
    return f"""
SELECT
    j.batch_id AS batch_number, j.id AS job_number, n.name AS batch_name,
    'b' || j.batch_id AS batch_id, 'j' || j.id AS job_id, j.model AS model, j.revision AS revision,
    j.state AS state, j.error_kind AS error_kind, j.error_message AS error_message,
    'j' || j.reused_from AS reused_from, {words.value("r.details", "speed_from")} AS speed_from,
    j.method AS scheme, j.bits AS bits, {words.double_quant} AS double_quant, {words.options} AS options,
    CASE WHEN r.checkpoint_path NOT IN ({_GONE}) AND {_BASE_PATH} NOT IN ({_GONE})
        THEN r.checkpoint_path END AS checkpoint_path, r.device_name AS device_name,
    COALESCE(r.dtype, j.dtype) AS dtype,
    COALESCE(r.compute_dtype, {words.value("j.scheme", "compute_dtype")}) AS compute_dtype,
    {figures},
    CASE WHEN {step_s} > 0 THEN {batch_size} / {step_s} END AS graph_decode_tokens_per_s,
    {words.number("r.details", "quality", "kl_mean_se")} AS kl_mean_se,
    'j' || NULLIF(j.baseline, j.id) AS baseline_job_id,
    {_ratio("weights_bytes", is_comparable)},
    {_ratio("disk_bytes", is_comparable)},
    {_ratio("decode_tokens_per_s", on_device)},
    r.protocol_hash AS protocol_hash, r.protocol AS protocol, r.details AS details,
    j.created_at AS created_at, j.started_at AS started_at, j.finished_at AS finished_at
FROM (
    SELECT j.id, j.batch_id, j.model, j.revision, j.state, j.error_kind, j.error_message, j.reused_from, j.method,
        j.bits, j.scheme, j.dtype, j.created_at, j.started_at, j.finished_at,
        (
            SELECT MAX(b.id) FROM jobs AS b
            WHERE {is_of_batch_and_model} AND b.method = 'none'
                AND b.revision {words.same} j.revision AND b.dtype = j.dtype AND {words.same_protocol}
        ) AS baseline
    FROM jobs AS j
    -- A batch that is still being stored is not there yet.
    WHERE NOT EXISTS (SELECT 1 FROM arrivals AS a WHERE a.batch_id = j.batch_id)
) AS j
JOIN batches AS n ON n.id = j.batch_id
LEFT JOIN results AS r ON r.job_id = COALESCE(j.reused_from, j.id)
LEFT JOIN jobs AS bj ON bj.id = j.baseline
LEFT JOIN results AS br ON br.job_id = COALESCE(bj.reused_from, bj.id)
"""  # noqa: S608  (of constants alone)
