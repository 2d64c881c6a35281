"""The speed of a model, and the memory that it used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from qbatch.core.stored_json import Stored, omitted_if_unknown

NOTABLE_SPREAD = 0.2
"""A larger spread between rounds is reported with the figures, since the host alone may cause differences of that
size."""


class Phase(StrEnum):
    """The timed phases."""

    LOAD_MODEL = "load_model"
    PREFILL = "prefill"
    DECODE = "decode"
    PER_TOKEN = "per_token"  # noqa: S105  (no secret)
    FORWARD = "forward"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes(Stored):
    """Statistics of a phase's times over all rounds, in seconds. ``tokens_per_s`` is known only for the prefill."""

    count: int | None = None
    mean: float | None = None
    stdev: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    tokens_per_s: float | None = omitted_if_unknown()


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseByRound(Stored):
    """The median and mean of each round, in seconds. ``spread`` is (largest - smallest median) / median of the medians;
    None for a single round."""

    p50: tuple[float, ...] | None = None
    mean: tuple[float, ...] | None = None
    spread: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRounds(Stored):
    """The timing rounds. ``interleaved_with``: the jobs of other models timed between these rounds; None if unknown."""

    count: int | None = None
    interleaved_with: tuple[str, ...] | None = None
    phases: Mapping[str, PhaseByRound] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShape(Stored):
    """The sizes that were actually run, after limiting the requested ones to the model's number of positions. Encoders
    have 0 new tokens. Fields that begin with ``eval`` belong to the evaluation text."""

    batch_size: int | None = omitted_if_unknown()
    prompt_tokens: int | None = omitted_if_unknown()
    new_tokens: int | None = omitted_if_unknown()
    eval_window: int | None = omitted_if_unknown()
    eval_stride: int | None = omitted_if_unknown()
    eval_max_windows: int | None = omitted_if_unknown()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory(Stored):
    """Peak memory use in bytes; None if the device does not report it."""

    max_ram: int | None = None
    max_global_vram: int | None = None
    max_process_vram: int | None = None
    max_allocated: int | None = None
    max_reserved: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Size(Stored):
    """The numbers of parameters (tied ones count once), and the bytes that they use."""

    num_parameters: int | None = None
    quantized_parameters: int | None = None
    weights_bytes: int | None = None
    quant_state_bytes: int | None = None
    buffer_bytes: int | None = None
    memory_footprint_bytes: int | None = None
