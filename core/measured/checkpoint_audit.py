"""The audits recorded when a checkpoint was written (docs/performance.md) and when it was measured."""

from __future__ import annotations

from dataclasses import dataclass

from qbatch.core.measured.stored_json import Stored, left_out


@dataclass(frozen=True, slots=True, kw_only=True)
class UnquantizedPart(Stored):
    """Parameters that were not quantized, grouped over layers."""

    name: str | None = None
    reason: str | None = None
    parameters: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError(Stored):
    """The Frobenius norm of a layer's quantization error, divided by that of its weight."""

    name: str | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointAudit(Stored):
    """How much of a model was quantized, what was not and why, and the quantization errors. A method's own entries are
    in ``stored``."""

    num_parameters: int | None = left_out()
    quantized_parameters: int | None = left_out()
    quantized_fraction: float | None = left_out()
    mostly_unquantized: bool | None = left_out()
    weights_bytes: int | None = left_out()
    bits_per_param: float | None = left_out()
    kept: tuple[UnquantizedPart, ...] | None = left_out()
    dropped_tensors: tuple[str, ...] | None = left_out()
    idle_skip_modules: tuple[str, ...] | None = left_out()
    relative_error_mean: float | None = left_out()
    relative_error_worst: tuple[LayerError, ...] | None = left_out()
    not_finite: tuple[str, ...] | None = left_out()
    shared_pass: int | None = left_out()
    whole_model_because: str | None = left_out()
    no_errors_because: str | None = left_out()
    writer: str | None = left_out()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuringAudit(Stored):
    """Remarks from measuring a model. ``spread_between_rounds`` is set only if it is large."""

    cpu_layers_on_generic_kernel: int | None = None
    perplexity_not_finite: bool | None = left_out()
    spread_between_rounds: float | None = None
