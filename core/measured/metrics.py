"""All metrics that are shown: their names, formats, and places in the tables.

``results``, ``compare`` and ``show``, their JSON and CSV, and the table in docs/measurements.md are built from these.
"""

from __future__ import annotations

from qbatch.core.measured.metric import (
    BaselineComparison,
    Better,
    ComparisonNoise,
    FloorNoise,
    Metric,
    MetricColumn,
    TimingNoise,
    Unit,
    Value,
)
from qbatch.core.measured.speed_figures import Phase

# Size

DISK = Metric(
    key="disk_bytes",
    label="disk",
    unit=Unit.BYTES,
    better=Better.LOWER,
    comparison=BaselineComparison.RATIO,
    value=lambda row: row.disk_bytes,
)
WEIGHTS = Metric(
    key="weights_bytes",
    label="weights",
    unit=Unit.BYTES,
    better=Better.LOWER,
    comparison=BaselineComparison.RATIO,
    value=lambda row: row.weights_bytes,
)
BITS_PER_PARAM = Metric(
    key="bits_per_param",
    label="bits/param",
    unit=Unit.BITS,
    better=Better.LOWER,
    value=lambda row: row.bits_per_param,
)

# Memory

PEAK_MEMORY = Metric(
    key="max_allocated_bytes",
    label="peak memory",
    unit=Unit.BYTES,
    better=Better.LOWER,
    comparison=BaselineComparison.RATIO,
    on_device=True,
    value=lambda row: row.max_allocated_bytes,
)


def _peak_memory(figure: str, label: str, value: Value) -> Metric:
    return Metric(
        key=f"details.memory.{figure}",
        label=label,
        unit=Unit.BYTES,
        better=Better.LOWER,
        on_device=True,
        value=value,
    )


MEMORY_METRICS: tuple[Metric, ...] = (
    _peak_memory("max_allocated", "allocated by torch", lambda row: row.details.memory.max_allocated),
    _peak_memory("max_reserved", "reserved by torch", lambda row: row.details.memory.max_reserved),
    _peak_memory("max_process_vram", "GPU, this process", lambda row: row.details.memory.max_process_vram),
    _peak_memory("max_global_vram", "GPU, all processes", lambda row: row.details.memory.max_global_vram),
    _peak_memory("max_ram", "host, resident", lambda row: row.details.memory.max_ram),
)

# Speed

PREFILL = Metric(
    key="prefill_s_p50",
    label="prefill",
    unit=Unit.SECONDS,
    better=Better.LOWER,
    comparison=BaselineComparison.RATIO,
    on_device=True,
    noise=TimingNoise(phase=Phase.PREFILL, of="median"),
    value=lambda row: row.prefill_s_p50,
)
FORWARD = Metric(
    key="forward_s_p50",
    label="forward",
    unit=Unit.SECONDS,
    better=Better.LOWER,
    comparison=BaselineComparison.RATIO,
    on_device=True,
    noise=TimingNoise(phase=Phase.FORWARD, of="median"),
    value=lambda row: row.forward_s_p50,
)
DECODE = Metric(
    key="decode_tokens_per_s",
    label="decode",
    unit=Unit.TOKENS_PER_S,
    better=Better.HIGHER,
    comparison=BaselineComparison.RATIO,
    on_device=True,
    noise=TimingNoise(phase=Phase.DECODE, of="mean"),
    value=lambda row: row.decode_tokens_per_s,
)
GRAPH_DECODE = Metric(
    key="graph_decode_tokens_per_s",
    label="graph decode",
    unit=Unit.TOKENS_PER_S,
    better=Better.HIGHER,
    comparison=BaselineComparison.RATIO,
    on_device=True,
    value=lambda row: row.graph_decode_tokens_per_s,
)
THROUGHPUT = Metric(
    key="forward_samples_per_s",
    label="throughput",
    unit=Unit.SAMPLES_PER_S,
    better=Better.HIGHER,
    comparison=BaselineComparison.RATIO,
    on_device=True,
    noise=TimingNoise(phase=Phase.FORWARD, of="mean"),
    value=lambda row: row.forward_samples_per_s,
)
PER_TOKEN_P50 = Metric(
    key="per_token_s_p50",
    label="per token p50",
    unit=Unit.SECONDS,
    better=Better.LOWER,
    comparison=BaselineComparison.RATIO,
    on_device=True,
    noise=TimingNoise(phase=Phase.PER_TOKEN, of="median"),
    value=lambda row: row.per_token_s_p50,
)
PER_TOKEN_P99 = Metric(
    key="per_token_s_p99",
    label="per token p99",
    unit=Unit.SECONDS,
    better=Better.LOWER,
    comparison=BaselineComparison.RATIO,
    on_device=True,
    value=lambda row: row.per_token_s_p99,
)
KERNELS_ALONE = Metric(
    key="details.why.kernels_alone.step_s",
    label="kernels alone",
    unit=Unit.SECONDS,
    better=Better.LOWER,
    comparison=BaselineComparison.RATIO,
    on_device=True,
    value=lambda row: row.details.why.kernels_alone.step_s,
)
ENERGY_PER_TOKEN = Metric(
    key="details.why.energy.decode.net_j_per_token",
    label="energy per token",
    unit=Unit.JOULES,
    better=Better.LOWER,
    comparison=BaselineComparison.RATIO,
    on_device=True,
    value=lambda row: row.details.why.energy.decode.net_j_per_token,
)


def _call_energy(key: str, label: str, value: Value, error: Value | None = None) -> Metric:
    return Metric(
        key=f"details.why.energy.{key}",
        label=label,
        unit=Unit.JOULES,
        better=Better.LOWER,
        on_device=True,
        value=value,
        error=error,
    )


ENERGY_METRICS: tuple[Metric, ...] = (
    _call_energy(
        "decode.net_j",
        "decode, net",
        lambda row: row.details.why.energy.decode.net_j,
        lambda row: row.details.why.energy.decode.uncertainty_j,
    ),
    _call_energy("decode.gross_j", "decode, gross", lambda row: row.details.why.energy.decode.gross_j),
    _call_energy(
        "prefill.net_j",
        "prefill, net",
        lambda row: row.details.why.energy.prefill.net_j,
        lambda row: row.details.why.energy.prefill.uncertainty_j,
    ),
    _call_energy("prefill.gross_j", "prefill, gross", lambda row: row.details.why.energy.prefill.gross_j),
)
QUANTIZE = Metric(
    key="quantize_s",
    label="quantize",
    unit=Unit.SECONDS,
    better=Better.LOWER,
    value=lambda row: row.quantize_s,
)
LOAD = Metric(
    key="load_model_s",
    label="load",
    unit=Unit.SECONDS,
    better=Better.LOWER,
    value=lambda row: row.load_model_s,
)

# Quality

_OF_PERPLEXITY = ComparisonNoise(
    distance=lambda row: row.details.quality.ln_ppl_ratio,
    error=lambda row: row.details.quality.ln_ppl_ratio_se,
    floor=lambda row: row.details.quality.floor.ln_ppl_ratio,
)
PERPLEXITY = Metric(
    key="perplexity",
    label="perplexity",
    unit=Unit.PLAIN,
    better=Better.LOWER,
    comparison=BaselineComparison.CHANGE,
    noise=_OF_PERPLEXITY,
    value=lambda row: row.perplexity,
)
KL_MEAN = Metric(
    key="kl_mean",
    label="KL",
    title="mean KL",
    unit=Unit.NATS,
    better=Better.LOWER,
    noise=ComparisonNoise(
        distance=lambda row: row.kl_mean,
        error=lambda row: row.details.quality.kl_mean_se,
        floor=lambda row: row.details.quality.floor.kl_mean,
    ),
    value=lambda row: row.kl_mean,
    in_details=lambda row: row.details.quality.kl_mean,
    error=lambda row: row.details.quality.kl_mean_se,
    floor=lambda row: row.details.quality.floor.kl_mean,
)
KL_MEAN_ERROR = Metric(
    key="details.quality.kl_mean_se",
    label="KL's standard error",
    unit=Unit.NATS,
    better=Better.LOWER,
    value=lambda row: row.details.quality.kl_mean_se,
)
KL_FLOOR = Metric(
    key="details.quality.floor.kl_mean",
    label="KL of 16-bit rounding",
    unit=Unit.NATS,
    better=Better.NEITHER,
    csv="kl_floor",
    value=lambda row: row.details.quality.floor.kl_mean,
)
KL_MEDIAN = Metric(
    key="details.quality.kl_median",
    label="median KL",
    unit=Unit.NATS,
    better=Better.LOWER,
    value=lambda row: row.details.quality.kl_median,
    error=lambda row: row.details.quality.kl_median_se,
    floor=lambda row: row.details.quality.floor.kl_median,
)
KL_P90 = Metric(
    key="details.quality.kl_p90",
    label="KL p90",
    unit=Unit.NATS,
    better=Better.LOWER,
    value=lambda row: row.details.quality.kl_p90,
    error=lambda row: row.details.quality.kl_p90_se,
    floor=lambda row: row.details.quality.floor.kl_p90,
)
KL_P95 = Metric(
    key="details.quality.kl_p95",
    label="KL p95",
    unit=Unit.NATS,
    better=Better.LOWER,
    value=lambda row: row.details.quality.kl_p95,
    error=lambda row: row.details.quality.kl_p95_se,
    floor=lambda row: row.details.quality.floor.kl_p95,
)
KL_P99 = Metric(
    key="details.quality.kl_p99",
    label="KL p99",
    unit=Unit.NATS,
    better=Better.LOWER,
    value=lambda row: row.details.quality.kl_p99,
    error=lambda row: row.details.quality.kl_p99_se,
    floor=lambda row: row.details.quality.floor.kl_p99,
)
KL_MAX = Metric(
    key="details.quality.kl_max",
    label="largest KL",
    unit=Unit.NATS,
    better=Better.LOWER,
    value=lambda row: row.details.quality.kl_max,
    floor=lambda row: row.details.quality.floor.kl_max,
)
LN_PPL_RATIO = Metric(
    key="details.quality.ln_ppl_ratio",
    label="ln PPL ratio",
    unit=Unit.NATS,
    better=Better.LOWER,
    noise=_OF_PERPLEXITY,
    value=lambda row: row.details.quality.ln_ppl_ratio,
    error=lambda row: row.details.quality.ln_ppl_ratio_se,
    floor=lambda row: row.details.quality.floor.ln_ppl_ratio,
)
LN_PPL_RATIO_ERROR = Metric(
    key="details.quality.ln_ppl_ratio_se",
    label="ln PPL ratio's standard error",
    unit=Unit.NATS,
    better=Better.LOWER,
    value=lambda row: row.details.quality.ln_ppl_ratio_se,
)
RMS_DELTA_P = Metric(
    key="details.quality.rms_delta_p",
    label="RMS Δp",
    unit=Unit.PROBABILITY,
    better=Better.LOWER,
    value=lambda row: row.details.quality.rms_delta_p,
    error=lambda row: row.details.quality.rms_delta_p_se,
    floor=lambda row: row.details.quality.floor.rms_delta_p,
)
TOP1 = Metric(
    key="top1_agreement",
    label="top-1",
    title="top-1 agreement",
    unit=Unit.SHARE,
    better=Better.HIGHER,
    noise=ComparisonNoise(
        distance=lambda row: _short_of_1(row.top1_agreement),
        error=lambda row: row.details.quality.top1_agreement_se,
        floor=lambda row: _short_of_1(row.details.quality.floor.top1_agreement),
    ),
    value=lambda row: row.top1_agreement,
    in_details=lambda row: row.details.quality.top1_agreement,
    error=lambda row: row.details.quality.top1_agreement_se,
    floor=lambda row: row.details.quality.floor.top1_agreement,
)
TOP1_ERROR = Metric(
    key="details.quality.top1_agreement_se",
    label="top-1's standard error",
    unit=Unit.SHARE,
    better=Better.LOWER,
    value=lambda row: row.details.quality.top1_agreement_se,
)
COSINE_MEAN = Metric(
    key="details.quality.cosine_mean",
    label="cosine",
    title="mean cosine, centred",
    unit=Unit.CORRELATION,
    better=Better.HIGHER,
    value=lambda row: row.details.quality.cosine_mean,
    floor=lambda row: row.details.quality.floor.cosine_mean,
)
COSINE_MIN = Metric(
    key="details.quality.cosine_min",
    label="smallest cosine",
    unit=Unit.CORRELATION,
    better=Better.HIGHER,
    value=lambda row: row.details.quality.cosine_min,
    floor=lambda row: row.details.quality.floor.cosine_min,
)
RANK_CORRELATION = Metric(
    key="details.quality.rank_correlation",
    label="rank corr",
    title="rank correlation",
    unit=Unit.CORRELATION,
    better=Better.HIGHER,
    noise=FloorNoise(floor=lambda row: row.details.quality.floor.rank_correlation),
    value=lambda row: row.details.quality.rank_correlation,
    floor=lambda row: row.details.quality.floor.rank_correlation,
)


def _short_of_1(share: float | None) -> float | None:
    return None if share is None else 1 - share


# The tables' columns and sections, in order

RESULTS_COLUMNS: tuple[MetricColumn, ...] = (
    MetricColumn(metrics=(WEIGHTS,)),
    MetricColumn(metrics=(DECODE, THROUGHPUT), rank=1),
    MetricColumn(metrics=(GRAPH_DECODE,), rank=3),
    MetricColumn(metrics=(KL_MEAN,)),
    MetricColumn(metrics=(RANK_CORRELATION,)),
    MetricColumn(metrics=(TOP1,), rank=2),
    MetricColumn(metrics=(PERPLEXITY,), rank=4),
    MetricColumn(metrics=(PREFILL, FORWARD), rank=5),
    MetricColumn(metrics=(PEAK_MEMORY,), rank=6),
    MetricColumn(metrics=(DISK,), rank=7),
    MetricColumn(metrics=(BITS_PER_PARAM,), rank=8),
    MetricColumn(metrics=(QUANTIZE,), rank=9),
    MetricColumn(metrics=(LOAD,), rank=10),
)
"""The columns of ``results``, and the first ones of ``compare``."""
COMPARE_COLUMNS: tuple[MetricColumn, ...] = (
    *RESULTS_COLUMNS,
    MetricColumn(metrics=(KL_MEAN_ERROR,)),
    MetricColumn(metrics=(KL_FLOOR,)),
    MetricColumn(metrics=(KL_P99,)),
    MetricColumn(metrics=(COSINE_MEAN,)),
    MetricColumn(metrics=(PER_TOKEN_P50,)),
    MetricColumn(metrics=(PER_TOKEN_P99,)),
    MetricColumn(metrics=(KERNELS_ALONE,)),
    MetricColumn(metrics=(ENERGY_PER_TOKEN,)),
)
"""Further columns of ``compare``, which has space for them because it shows few rows of one model."""
COMPARE_CSV: tuple[Metric, ...] = (
    *(KL_MEAN_ERROR, KL_P99, LN_PPL_RATIO, LN_PPL_RATIO_ERROR, TOP1_ERROR, RANK_CORRELATION, KL_FLOOR),
)
"""The columns that ``compare --format csv`` has in addition to those of a result and the ratios."""
PREDICTION_LINES: tuple[Metric, ...] = (
    *(KL_MEAN, KL_MEDIAN, KL_P90, KL_P95, KL_P99, KL_MAX, LN_PPL_RATIO, RMS_DELTA_P, TOP1),
)
EMBEDDING_LINES: tuple[Metric, ...] = (COSINE_MEAN, COSINE_MIN, RANK_CORRELATION)
"""The metrics under "quality" in ``show``: for predictions, and for embeddings."""

COMPARED_METRICS: tuple[Metric, ...] = tuple(metric for column in COMPARE_COLUMNS for metric in column.metrics)
ALL_METRICS: tuple[Metric, ...] = tuple(
    {
        metric.key: metric
        for metric in (
            *(*COMPARED_METRICS, *PREDICTION_LINES, *EMBEDDING_LINES),
            *(*COMPARE_CSV, *MEMORY_METRICS, *ENERGY_METRICS),
        )
    }.values()
)
