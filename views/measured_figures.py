"""All figures of one row: size, speed by phase, memory, quality with standard errors, energy."""

from __future__ import annotations

from collections.abc import Iterable

from qbatch.core.measured.decode_figures import PhaseEnergy
from qbatch.core.measured.metric import ComparisonNoise, Metric, Unit
from qbatch.core.measured.metrics import DECODE, EMBEDDING_LINES, MEMORY_METRICS, PREDICTION_LINES, THROUGHPUT
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.speed_figures import Phase, PhaseTimes
from qbatch.core.methods.registry import describe_row
from qbatch.views.audit_text import fairness_remarks
from qbatch.views.formats import NOTHING, Column, render
from qbatch.views.metric_text import show_metric, show_value
from qbatch.views.noise import NOT_DISTINGUISHABLE, is_noise
from qbatch.views.units import show_bytes_exactly, show_float, show_percent, show_rate, show_seconds

Lines = Iterable[tuple[str, str]]
_PHASES: tuple[Column, ...] = (
    Column(key="phase", title="phase"),
    Column(key="count", title="count"),
    *(Column(key=name, title=name, show=show_seconds) for name in ("mean", "stdev", "p50", "p90", "p95", "p99")),
    Column(key="rate", title="rate"),
)
_RATES = {Phase.DECODE: DECODE, Phase.FORWARD: THROUGHPUT}
_AGAINST = {"hidden": "hidden states (replayed)", "logits": "logits", "embedding": "embeddings"}


def size_lines(row: ResultRow) -> Lines:
    yield "parameters", NOTHING if row.num_parameters is None else f"{row.num_parameters:,}"
    yield "weights", _exactly(row.weights_bytes)
    yield "on disk", _exactly(row.disk_bytes)
    yield "memory footprint", f"{_exactly(row.memory_footprint_bytes)}, {describe_row(row.scheme).footprint}"


def _exactly(count: int | None) -> str:
    return NOTHING if count is None else show_bytes_exactly(count)


def speed_table(row: ResultRow) -> str:
    """A table with a line for each phase, over all rounds; "" if nothing but loading was timed."""
    lines = [
        {
            "phase": phase,
            "rate": _rate(row, phase, times),
            "count": times.count,
            "mean": times.mean,
            "stdev": times.stdev,
            "p50": times.p50,
            "p90": times.p90,
            "p95": times.p95,
            "p99": times.p99,
        }
        for phase, times in (row.details.stats or {}).items()
        if phase != Phase.LOAD_MODEL or row.speed_from is None  # how long it took to load is the row's own
    ]
    is_timed = any(line["phase"] != Phase.LOAD_MODEL for line in lines)
    return render(lines, _PHASES, "table") if is_timed else ""


def _rate(row: ResultRow, phase: str, times: PhaseTimes) -> str | None:
    if times.tokens_per_s is not None:
        return show_rate(times.tokens_per_s, "tok")
    metric = next((metric for known, metric in _RATES.items() if known == phase), None)
    return None if metric is None or metric.value(row) is None else show_metric(metric, row)


def round_lines(row: ResultRow) -> Lines:
    """Yield each phase's medians by round and how far they lie apart. Nothing if there was one round."""
    rounds = row.details.rounds
    if rounds.count is None or rounds.count < 2:
        return
    others = ", ".join(rounds.interleaved_with or ())
    yield "rounds", f"{rounds.count}, " + (f"alternating with {others}" if others else "one directly after the other")
    for phase, times in (rounds.phases or {}).items():
        medians = ", ".join(show_seconds(median) for median in times.p50 or ())
        apart = NOTHING if times.spread is None else show_percent(times.spread)
        yield phase, f"{medians}: medians {apart} apart"


def memory_lines(row: ResultRow) -> Lines:
    for metric in MEMORY_METRICS:
        if metric.value(row) is not None:
            yield metric.line_title, show_metric(metric, row)


def quality_lines(row: ResultRow) -> Lines:
    """Yield perplexity and the comparison with the base: each figure ± its standard error, with the 16-bit floor."""
    if row.perplexity is not None:
        error = row.details.perplexity.perplexity_se
        with_error = "" if error is None else f" ± {show_float(error, 2)}"
        yield "perplexity", f"{show_float(row.perplexity)}{with_error}{_scored(row)}"
    if reason := row.details.perplexity.reason:
        yield "no perplexity", reason
    quality = row.details.quality
    if quality.reason:
        yield "not compared", quality.reason
    for metric in (*PREDICTION_LINES, *EMBEDDING_LINES):
        if (value := metric.line_value(row)) is not None:
            yield metric.line_title, _beside_floor(row, metric, value)
    yield from _by_confidence(row)
    counts = (("windows", quality.windows), ("positions", quality.rows), ("pieces", quality.pieces))
    if compared := [f"{count:,} {name}" for name, count in counts if count is not None]:
        outputs = _AGAINST.get(str(quality.against), "outputs")
        yield "over", ", ".join(compared) + f", compared with the baseline's {outputs}"


def _by_confidence(row: ResultRow) -> Lines:
    """Yield the KL where the base was sure of the next token, and where it was not."""
    for bucket in row.details.quality.kl_by_confidence or ():
        if bucket.kl_mean is not None:
            error = "" if bucket.kl_mean_se is None else f" ± {show_value(Unit.NATS, bucket.kl_mean_se)}"
            title = f"base {bucket.above:.0%} to {bucket.below:.0%} sure"
            yield title, f"mean KL {show_value(Unit.NATS, bucket.kl_mean)}{error}, {bucket.rows:,} positions"


def _scored(row: ResultRow) -> str:
    text = row.details.perplexity
    return "" if text.tokens is None else f", of {text.tokens:,} tokens in {text.windows} windows"


def _beside_floor(row: ResultRow, metric: Metric, value: float) -> str:
    error, floor = (None if of is None else of(row) for of in (metric.error, metric.floor))
    text = show_value(metric.unit, value)
    text += "" if error is None else f" ± {show_value(metric.unit, error)}"
    text += "" if floor is None else f"  (16-bit rounding alone: {show_value(metric.unit, floor)})"
    is_same = isinstance(metric.noise, ComparisonNoise) and is_noise(metric, row)
    return text + (f", {NOT_DISTINGUISHABLE}" if is_same else "")


def energy_lines(row: ResultRow) -> Lines:
    energy = row.details.why.energy
    if energy.reason:
        yield "not measured", energy.reason
    if energy.idle_w is not None:
        yield "idle", f"{energy.idle_w:.0f} W with the model loaded"
    for title, phase in (("prefill", energy.prefill), ("decode", energy.decode)):
        if phase.net_j is not None:
            yield title, _joules(phase)
    for remark in fairness_remarks(energy.flags):
        yield "disturbed", remark


def _joules(phase: PhaseEnergy) -> str:
    net, gross, error = (
        NOTHING if value is None else show_float(value, 3)
        for value in (phase.net_j, phase.gross_j, phase.uncertainty_j)
    )
    a_token = phase.net_j_per_token
    return f"{net} ± {error} J net, {gross} gross" + (
        f"; {show_value(Unit.JOULES, a_token)} per token" if a_token else ""
    )
