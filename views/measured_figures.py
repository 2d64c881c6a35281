"""One row's figures at length: size, speed by phase, memory, quality with its errors, energy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qbatch.core.methods.registry import describe_row
from qbatch.views.figures import Row, dig
from qbatch.views.formats import Column, render
from qbatch.views.noise import NOT_DISTINGUISHABLE, is_noise
from qbatch.views.quantized_share import unfair
from qbatch.views.units import (
    show_bytes,
    show_bytes_exactly,
    show_float,
    show_nats,
    show_percent,
    show_rate,
    show_seconds,
)

Lines = Iterable[tuple[str, str]]
_STATISTICS = ("mean", "stdev", "p50", "p90", "p95", "p99")
_PHASES: tuple[Column, ...] = (
    Column(key="phase", title="phase"),
    Column(key="count", title="count"),
    *(Column(key=name, title=name, show=show_seconds) for name in _STATISTICS),
    Column(key="rate", title="rate"),
)
_RATES = {"decode": "decode_tokens_per_s", "forward": "forward_samples_per_s"}
_MEMORY = {
    "max_allocated": "allocated by torch",
    "max_reserved": "reserved by torch",
    "max_process_vram": "GPU, this process",
    "max_global_vram": "GPU, all processes",
    "max_ram": "host, resident",
}
_DIVERGENCE = {
    "kl_mean": "mean KL",
    "kl_median": "median KL",
    "kl_p90": "KL p90",
    "kl_p95": "KL p95",
    "kl_p99": "KL p99",
    "kl_max": "largest KL",
    "ln_ppl_ratio": "ln PPL ratio",
    "rms_delta_p": "RMS Δp",
    "top1_agreement": "top-1 agreement",
}
_SIMILARITY = {
    "cosine_mean": "mean cosine, centred",
    "cosine_min": "smallest cosine",
    "rank_correlation": "rank correlation",
}
_AGAINST = {"hidden": "hidden states, replayed", "logits": "logits", "embedding": "embeddings"}
# The columns of the row that carry a figure of the comparison, by which its noise is judged.
_JUDGED = {"kl_mean": "kl_mean", "ln_ppl_ratio": "perplexity", "top1_agreement": "top1_agreement"}


def size_lines(row: Row) -> Lines:
    yield "parameters", f"{row['num_parameters']:,}"
    yield "weights", show_bytes_exactly(row["weights_bytes"])
    yield "on disk", show_bytes_exactly(row["disk_bytes"])
    yield (
        "memory footprint",
        f"{show_bytes_exactly(row['memory_footprint_bytes'])}, {describe_row(row['scheme']).footprint}",
    )


def speed_table(row: Row) -> str:
    """A line for each phase, over all rounds; "" where nothing was timed."""
    stats: Mapping[str, Any] = dig(row, "details.stats") or {}
    lines = [
        {
            "phase": phase,
            "rate": _rate(row, phase, found),
            **{name: found.get(name) for name in ("count", *_STATISTICS)},
        }
        for phase, found in stats.items()
    ]
    return render(lines, _PHASES, "table") if lines else ""


def _rate(row: Row, phase: str, found: Mapping[str, Any]) -> str | None:
    if found.get("tokens_per_s") is not None:
        return show_rate(found["tokens_per_s"], "tok")
    per_second = row.get(_RATES.get(phase, ""))
    return None if per_second is None else show_rate(per_second, "tok" if phase == "decode" else "sample")


def round_lines(row: Row) -> Lines:
    """How far the rounds of each phase lie apart, where there were several."""
    rounds: Mapping[str, Any] = dig(row, "details.rounds") or {}
    if rounds.get("count", 1) < 2:
        return
    others = ", ".join(rounds.get("interleaved_with") or ())
    yield "rounds", f"{rounds['count']}, " + (f"in turns with {others}" if others else "in a row")
    for phase, found in rounds["phases"].items():
        medians = ", ".join(show_seconds(median) for median in found["p50"])
        yield phase, f"{medians}: medians {show_percent(found['spread'])} apart"


def memory_lines(row: Row) -> Lines:
    for name, title in _MEMORY.items():
        if (size := dig(row, f"details.memory.{name}")) is not None:
            yield title, show_bytes(size)


def quality_lines(row: Row) -> Lines:
    """Perplexity, and the comparison with the base: each figure ± its standard error, beside that of 16 bits alone."""
    if row["perplexity"] is not None:
        error = dig(row, "details.perplexity.perplexity_se")
        with_error = "" if error is None else f" ± {show_float(error, 2)}"
        yield "perplexity", f"{show_float(row['perplexity'])}{with_error}{_scored(row)}"
    found: Mapping[str, Any] = dig(row, "details.quality") or {}
    if found.get("reason"):
        yield "not compared", found["reason"]
    for name, title in _DIVERGENCE.items():
        if found.get(name) is not None:
            yield title, _divergence(row, found, name)
    for name, title in _SIMILARITY.items():
        if found.get(name) is not None:
            floor = dig(found, f"floor.{name}")
            yield title, f"{found[name]:.4f}" + (f"  (16 bits alone: {floor:.4f})" if floor is not None else "")
    if counts := [f"{found[name]:,} {name}" for name in ("windows", "rows", "pieces") if found.get(name) is not None]:
        yield "over", ", ".join(counts) + f", against the base's {_AGAINST.get(str(found.get('against')), 'outputs')}"


def _scored(row: Row) -> str:
    tokens, windows = (dig(row, f"details.perplexity.{name}") for name in ("tokens", "windows"))
    return "" if tokens is None else f", of {tokens:,} tokens in {windows} windows"


def _divergence(row: Row, found: Mapping[str, Any], name: str) -> str:
    show = show_percent if name == "top1_agreement" else show_nats
    error, floor = found.get(f"{name}_se"), dig(found, f"floor.{name}")
    text = show(found[name]) + (f" ± {show(error)}" if error is not None else "")
    if floor is not None:
        text += f"  (16 bits alone: {show(floor)})"
    return text + (f", {NOT_DISTINGUISHABLE}" if name in _JUDGED and is_noise(_JUDGED[name], row) else "")


def energy_lines(row: Row) -> Lines:
    energy: Mapping[str, Any] = dig(row, "details.why.energy") or {}
    if energy.get("reason"):
        yield "not measured", energy["reason"]
    if energy.get("idle_w") is not None:
        yield "idle", f"{energy['idle_w']:.0f} W with the model loaded"
    for phase in ("prefill", "decode"):
        if dig(energy, f"{phase}.net_j") is not None:
            yield phase, _joules(energy[phase])
    for remark in unfair(energy.get("flags")):
        yield "not fair", remark


def _joules(phase: Mapping[str, Any]) -> str:
    net, gross, error = (show_float(phase[name], 3) for name in ("net_j", "gross_j", "uncertainty_j"))
    a_token = phase.get("net_j_per_token")
    return f"{net} ± {error} J net, {gross} gross" + (f"; {show_float(a_token, 3)} J a token" if a_token else "")
