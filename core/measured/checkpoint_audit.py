"""The audits recorded when a checkpoint was written (docs/performance.md) and when it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qbatch.core.measured.loader_judgement import LoaderJudgement
from qbatch.core.stored_json import OMITTED_IF_UNKNOWN, Stored, omitted_if_unknown

SKIPPED_ON_REQUEST = "skipped on request"
"""The reason of a part that the scheme's skip list names."""


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
class AdapterTraining(Stored):
    """How an adapter was trained. ``first_kl`` and ``last_kl``: of the windows of its first and last step, in nats; the
    first is that of the attempt that finished it, which went on ``resumed_after_step``."""

    steps: int | None = None
    resumed_after_step: int | None = omitted_if_unknown()
    optimizer: str | None = None
    first_kl: float | None = None
    last_kl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointAudit(Stored):
    """How much of a model was quantized, what was not and why, and the quantization errors. A method's own entries are
    in ``stored``. Of an adapter: how many layers have factors, and which share of the weights' error, and of that of
    the layers' outputs on the text, these leave (ratios of norms)."""

    num_parameters: int | None = omitted_if_unknown()
    quantized_parameters: int | None = omitted_if_unknown()
    quantized_fraction: float | None = omitted_if_unknown()
    mostly_unquantized: bool | None = omitted_if_unknown()
    weights_bytes: int | None = omitted_if_unknown()
    bits_per_param: float | None = omitted_if_unknown()
    kept: tuple[UnquantizedPart, ...] | None = omitted_if_unknown()
    dropped_tensors: tuple[str, ...] | None = omitted_if_unknown()
    idle_skip_modules: tuple[str, ...] | None = omitted_if_unknown()
    relative_error_mean: float | None = omitted_if_unknown()
    relative_error_worst: tuple[LayerError, ...] | None = omitted_if_unknown()
    not_finite: tuple[str, ...] | None = omitted_if_unknown()
    shared_pass: int | None = omitted_if_unknown()
    stale_quantization: str | None = omitted_if_unknown()
    forward: str | None = omitted_if_unknown()
    whole_model_because: str | None = omitted_if_unknown()
    no_errors_because: str | None = omitted_if_unknown()
    writer: str | None = omitted_if_unknown()
    loaders: Mapping[str, LoaderJudgement] | None = omitted_if_unknown()
    recovered_layers: int | None = omitted_if_unknown()
    weight_error_left: float | None = omitted_if_unknown()
    output_error_left: float | None = omitted_if_unknown()
    training: AdapterTraining = field(default_factory=AdapterTraining, metadata=OMITTED_IF_UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuringAudit(Stored):
    """Remarks from measuring a model. ``spread_between_rounds`` is set only if it is large."""

    cpu_layers_on_generic_kernel: int | None = None
    perplexity_not_finite: bool | None = omitted_if_unknown()
    spread_between_rounds: float | None = None
