"""A job and its measurement: the rows that ``results`` and ``compare`` show, and write as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qbatch.core.measured.measured_part import MeasuredPart, why_not_requested
from qbatch.core.measured.measurement import MEASURED_COLUMNS, Figures
from qbatch.core.measured.stored_protocol import StoredProtocol
from qbatch.core.measured.task_answers import TaskAnswers
from qbatch.core.recovery import Recovery, with_adapter_mark
from qbatch.core.search.mixture_origin import MixtureOrigin
from qbatch.core.stored_json import OMITTED_IF_UNKNOWN

_FIRST_FIELDS = (
    *("batch_id", "job_id", "model", "revision", "state", "error_kind", "error_message", "reused_from", "speed_from"),
    *("scheme", "bits", "double_quant", "options", "mixture", "checkpoint_path"),
)
_LAST_FIELDS = ("baseline_job_id", "protocol", "protocol_hash", "not_measured", "details")
# Figures that follow from stored ones, each with the column after which it is written.
_DERIVED_FIGURES = {"graph_decode_tokens_per_s": "decode_tokens_per_s"}
_DERIVED = (*_DERIVED_FIGURES, "speed_from", "not_measured")
_FIGURES = tuple(
    name
    for column in MEASURED_COLUMNS
    for name in (column, *(new for new, after in _DERIVED_FIGURES.items() if after == column))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow(Figures):
    """A job, ended or not. Figures that were not measured are None.

    ``options`` are the options of its scheme as requested. ``mixture``: what it has to do with a search. ``dtype`` and
    ``compute_dtype`` are the requested ones until the job is measured. ``protocol`` is the protocol of the measurement.
    ``baseline_job_id`` is the baseline in the same batch with the same source and protocol. ``answers``: how each
    question of its tasks was answered, by task or group, where rows were asked for with them; ``was_begun``: whether
    any worker has begun the job, and written a log. These two are not part of its JSON.
    """

    batch_id: str
    job_id: str
    model: str
    revision: str | None = None
    state: str
    error_kind: str | None = None
    error_message: str | None = None
    reused_from: str | None = None
    scheme: str
    bits: int
    double_quant: bool = False
    options: Mapping[str, Any]
    mixture: MixtureOrigin = field(default_factory=MixtureOrigin, metadata=OMITTED_IF_UNKNOWN)
    checkpoint_path: str | None = None
    dtype: str
    compute_dtype: str
    baseline_job_id: str | None = None
    protocol: StoredProtocol = field(default_factory=StoredProtocol)
    protocol_hash: str | None = None
    answers: Mapping[str, TaskAnswers] = field(default_factory=dict)
    was_begun: bool = True

    def __repr__(self) -> str:
        """One line: all that was measured fills screens."""
        adapted = self.scheme if self.recovery is None else with_adapter_mark(self.scheme, self.recovery.slug)
        return f"<ResultRow {self.job_id}: {self.model} {adapted}{self.mixture.title}, {self.state}>"

    @classmethod
    def written_order(cls) -> tuple[str, ...]:
        return (*_FIRST_FIELDS, *_FIGURES, *_LAST_FIELDS)

    def _is_written(self, name: str) -> bool:
        return name in _DERIVED or Figures._is_written(self, name)

    @property
    def graph_decode_tokens_per_s(self) -> float | None:
        """The rate at which the kernels of a decode step run under a CUDA graph, without the host."""
        step_s = self.details.why.kernels_alone.step_s
        batch_size = self.details.shapes.batch_size or self.protocol.batch_size
        return None if step_s is None or step_s <= 0 or batch_size is None else batch_size / step_s

    @property
    def speed_from(self) -> str | None:
        """The job that was timed: one of the same shape, scheme, batch and GPU. None if it is this one."""
        return self.details.speed_from

    @property
    def not_measured(self) -> Mapping[str, str]:
        """Why a part of the measurement is missing, by its name. Empty for a job without a result."""
        if not self.protocol.is_known:
            return {}
        stored, asked = self.details.not_measured or {}, self.protocol.parts
        return {
            part.value: stored.get(part) or self._why_not_asked(part)
            for part in MeasuredPart
            if part in stored or (part not in asked and not self._has(part))
        }

    def _has(self, part: MeasuredPart) -> bool:
        """Whether there are figures of a part that the protocol does not mention."""
        why = self.details.why
        known = {MeasuredPart.WHY: why.profile.is_known, MeasuredPart.ENERGY: why.energy.idle_w is not None}
        return known.get(part, False)

    def _why_not_asked(self, part: MeasuredPart) -> str:
        if self.details.is_on_cpu and part in (MeasuredPart.WHY, MeasuredPart.ENERGY):
            return "qbatch measures it on a GPU only"
        return why_not_requested(part)

    @property
    def is_baseline(self) -> bool:
        return self.scheme == "none"

    @property
    def recovery(self) -> Recovery | None:
        """The adapter that it was measured with."""
        stored = self.options.get("recovery")
        return None if stored is None else Recovery.find(stored)
