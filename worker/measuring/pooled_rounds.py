"""The rounds of a row together: its figures, and how far they lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qbatch.worker.measuring.speed.fairness import flags_of
from qbatch.worker.measuring.speed.phases import Round
from qbatch.worker.measuring.stats import percentile, summarize

# A spread above this is said beside the figures: differences between rows under it are easily the host's.
_NOTABLE_SPREAD = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """``columns`` of the measurement and full ``stats`` by phase, over the times of all rounds. ``by_round`` has for
    each phase every round's median (p50) and mean, and the ``spread``: (largest - smallest median) / their median;
    None for a single round. ``notable_spread`` is the largest, where it is above 20 %."""

    columns: Mapping[str, float]
    stats: Mapping[str, Any]
    by_round: Mapping[str, Any]
    notable_spread: float | None
    shapes: Mapping[str, int]
    flags: Mapping[str, bool] | None


def pool(rounds: Sequence[Round]) -> Speed:
    """The figures of a row's ``rounds`` (one at least), all of one shape."""
    shapes = rounds[0].shapes
    phases = {name: [one.times_s[name] for one in rounds] for name in rounds[0].times_s}
    stats = {name: asdict(summarize([s for times_s in of for s in times_s])) for name, of in phases.items()}
    by_round = {name: _by_round(of) for name, of in phases.items()}
    largest = max((phase["spread"] or 0.0 for phase in by_round.values()), default=0.0)
    if "prefill" in stats:
        stats["prefill"]["tokens_per_s"] = shapes["batch_size"] * shapes["prompt_tokens"] / stats["prefill"]["mean"]
    return Speed(
        columns=_columns(stats, shapes),
        stats=stats,
        by_round=by_round,
        notable_spread=largest if largest > _NOTABLE_SPREAD else None,
        shapes=shapes,
        flags=flags_of([one.sighting for one in rounds]),
    )


def _columns(stats: Mapping[str, Any], shapes: Mapping[str, int]) -> dict[str, float]:
    if "forward" in stats:
        forward = stats["forward"]
        return {"forward_s_p50": forward["p50"], "forward_samples_per_s": shapes["batch_size"] / forward["mean"]}
    return {
        "prefill_s_p50": stats["prefill"]["p50"],
        "per_token_s_p50": stats["per_token"]["p50"],
        "per_token_s_p99": stats["per_token"]["p99"],
        "decode_tokens_per_s": shapes["batch_size"] * (shapes["new_tokens"] - 1) / stats["decode"]["mean"],
    }


def _by_round(times_s: Sequence[Sequence[float]]) -> dict[str, Any]:
    medians = [percentile(sorted(of_round), 50) for of_round in times_s]
    return {
        "p50": medians,
        "mean": [statistics.fmean(of_round) for of_round in times_s],
        "spread": (max(medians) - min(medians)) / statistics.median(medians) if len(medians) > 1 else None,
    }
