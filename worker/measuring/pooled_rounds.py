"""The figures of a row from all its rounds, and how far the rounds lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qbatch.core.measured.speed_figures import NOTABLE_SPREAD, Phase, PhaseByRound, PhaseTimes
from qbatch.worker.measuring.speed.fairness import flags_of
from qbatch.worker.measuring.speed.phases import Round, TimedShape
from qbatch.worker.measuring.stats import Stats, percentile, summarize


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A row's speed as it is stored: columns of the measurement, and the times of all rounds by phase (``stats``).

    ``by_round`` has the times of each round by phase, and their ``spread``, (largest - smallest median) / median of the
    medians, None for a single round. ``notable_spread`` is the largest spread of all phases if it is above 20 %.
    """

    prefill_s_p50: float | None = None
    decode_tokens_per_s: float | None = None
    per_token_s_p50: float | None = None
    per_token_s_p99: float | None = None
    forward_s_p50: float | None = None
    forward_samples_per_s: float | None = None
    stats: Mapping[str, PhaseTimes]
    by_round: Mapping[str, PhaseByRound]
    notable_spread: float | None
    shape: TimedShape
    flags: Mapping[str, bool] | None


def pool(rounds: Sequence[Round]) -> Speed:
    """The figures of a row from its ``rounds``, of which there is at least one, all of one shape."""
    shape = rounds[0].shape
    phases = {name: [one.times_s[name] for one in rounds] for name in rounds[0].times_s}
    stats = {name: summarize([s for times_s in of for s in times_s]) for name, of in phases.items()}
    by_round = {name: _by_round(of) for name, of in phases.items()}
    largest = max((phase.spread or 0.0 for phase in by_round.values()), default=0.0)
    prefill, decode = stats.get(Phase.PREFILL), stats.get(Phase.DECODE)
    per_token, forward = stats.get(Phase.PER_TOKEN), stats.get(Phase.FORWARD)
    return Speed(
        prefill_s_p50=None if prefill is None else prefill.p50,
        decode_tokens_per_s=None if decode is None else shape.batch_size * (shape.new_tokens - 1) / decode.mean,
        per_token_s_p50=None if per_token is None else per_token.p50,
        per_token_s_p99=None if per_token is None else per_token.p99,
        forward_s_p50=None if forward is None else forward.p50,
        forward_samples_per_s=None if forward is None else shape.batch_size / forward.mean,
        stats={str(name): _phase_times(name, of, shape) for name, of in stats.items()},
        by_round={str(name): of for name, of in by_round.items()},
        notable_spread=largest if largest > NOTABLE_SPREAD else None,
        shape=shape,
        flags=flags_of([one.conditions for one in rounds]),
    )


def _phase_times(phase: Phase, stats: Stats, shape: TimedShape) -> PhaseTimes:
    is_prefill = phase == Phase.PREFILL
    return stats.as_times(tokens_per_s=shape.batch_size * shape.prompt_tokens / stats.mean if is_prefill else None)


def _by_round(times_s: Sequence[Sequence[float]]) -> PhaseByRound:
    medians = tuple(percentile(sorted(of_round), 50) for of_round in times_s)
    return PhaseByRound(
        p50=medians,
        mean=tuple(statistics.fmean(of_round) for of_round in times_s),
        spread=(max(medians) - min(medians)) / statistics.median(medians) if len(medians) > 1 else None,
    )
