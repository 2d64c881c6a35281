"""One measurement: the columns of a result, and its details."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qbatch.core.kinds import DType
from qbatch.core.measured.details import Details
from qbatch.core.measured.task_answers import TaskAnswers
from qbatch.core.stored_json import Stored, field_names, omitted_if_unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures(Stored):
    """The figures of a measured model, in bytes, seconds, tokens per second, and nats. None means "not measured".

    All fields except ``details`` are columns of the results table.
    """

    device_name: str | None = None
    dtype: str | None = None
    compute_dtype: str | None = None
    num_parameters: int | None = None
    quantized_fraction: float | None = None
    bits_per_param: float | None = None
    disk_bytes: int | None = None
    memory_footprint_bytes: int | None = None
    weights_bytes: int | None = None
    max_allocated_bytes: int | None = None
    load_model_s: float | None = None
    quantize_s: float | None = None
    prefill_s_p50: float | None = None
    decode_tokens_per_s: float | None = None
    per_token_s_p50: float | None = None
    per_token_s_p99: float | None = None
    forward_s_p50: float | None = None
    forward_samples_per_s: float | None = None
    perplexity: float | None = None
    kl_mean: float | None = None
    top1_agreement: float | None = None
    details: Details = field(default_factory=Details)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement(Figures):
    """The figures that a worker measured. The fields listed here are always known, except ``answers``: those to the
    questions of each task, which are stored apart from the figures."""

    device_name: str
    dtype: DType
    compute_dtype: DType
    num_parameters: int
    quantized_fraction: float
    bits_per_param: float
    disk_bytes: int
    memory_footprint_bytes: int
    weights_bytes: int
    answers: Mapping[str, TaskAnswers] | None = omitted_if_unknown()


MEASURED_COLUMNS: tuple[str, ...] = tuple(name for name in field_names(Figures) if name != "details")
