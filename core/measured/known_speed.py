"""The speed of a model that another one of the same shape has too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qbatch.core.measured.measurement import Figures, Measurement
from qbatch.core.measured.speed_figures import Phase

_COLUMNS = (
    *("max_allocated_bytes", "prefill_s_p50", "decode_tokens_per_s", "per_token_s_p50", "per_token_s_p99"),
    *("forward_s_p50", "forward_samples_per_s"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSpeed:
    """What the job ``job_id`` (``j12``) measured."""

    job_id: str
    figures: Figures


def with_speed_of(measurement: Measurement, known: KnownSpeed) -> Measurement:
    """``measurement`` with the known times, peaks of memory, rounds and reasons, and with the job that they are of."""
    own, other = measurement.details, known.figures.details
    timed = {name: times for name, times in (other.stats or {}).items() if name != Phase.LOAD_MODEL}
    details = replace(
        own,
        memory=other.memory,
        shapes=replace(
            own.shapes,
            batch_size=other.shapes.batch_size,
            prompt_tokens=other.shapes.prompt_tokens,
            new_tokens=other.shapes.new_tokens,
        ),
        stats={**(own.stats or {}), **timed},
        rounds=other.rounds,
        flags=other.flags,
        why=other.why,
        noise_inputs=other.noise_inputs,
        audits=replace(own.audits, spread_between_rounds=other.audits.spread_between_rounds),
        speed_from=known.job_id,
    )
    return replace(measurement, details=details, **{name: getattr(known.figures, name) for name in _COLUMNS})
