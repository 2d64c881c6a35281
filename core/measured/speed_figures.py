"""How fast a model is, and how much memory that took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from qbatch.core.measured.stored_json import Stored, left_out


class Phase(StrEnum):
    """What is timed."""

    LOAD_MODEL = "load_model"
    PREFILL = "prefill"
    DECODE = "decode"
    PER_TOKEN = "per_token"  # noqa: S105  (no secret)
    FORWARD = "forward"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes(Stored):
    """The times of a phase over all rounds, in seconds. ``tokens_per_s``: of the prefill alone."""

    count: int | None = None
    mean: float | None = None
    stdev: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    tokens_per_s: float | None = left_out()


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseByRound(Stored):
    """Each round's median and mean, in seconds, and (largest - smallest median) / their median: None for one round."""

    p50: tuple[float, ...] | None = None
    mean: tuple[float, ...] | None = None
    spread: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRounds(Stored):
    """``interleaved_with``: the jobs of other models that were timed between these rounds; None where unknown."""

    count: int | None = None
    interleaved_with: tuple[str, ...] | None = None
    phases: Mapping[str, PhaseByRound] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShape(Stored):
    """What was really run, after the model's positions clipped what was asked for. An encoder has 0 new tokens; what
    begins with ``eval`` is of the text."""

    batch_size: int | None = left_out()
    prompt_tokens: int | None = left_out()
    new_tokens: int | None = left_out()
    eval_window: int | None = left_out()
    eval_stride: int | None = left_out()
    eval_max_windows: int | None = left_out()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory(Stored):
    """Peaks in bytes; None where the device does not tell."""

    max_ram: int | None = None
    max_global_vram: int | None = None
    max_process_vram: int | None = None
    max_allocated: int | None = None
    max_reserved: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Size(Stored):
    """Counts of parameters, tied ones once, and the bytes that hold them."""

    num_parameters: int | None = None
    quantized_parameters: int | None = None
    weights_bytes: int | None = None
    quant_state_bytes: int | None = None
    buffer_bytes: int | None = None
    memory_footprint_bytes: int | None = None
