"""The details of a result, stored as JSON in addition to its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qbatch.core.measured.checkpoint_audit import CheckpointAudit, MeasuringAudit
from qbatch.core.measured.decode_figures import DecodeReasons
from qbatch.core.measured.quality_figures import FurtherText, Quality, TaskScores, TextPerplexity
from qbatch.core.measured.speed_figures import Memory, Phase, PhaseByRound, PhaseTimes, RunShape, Size, TimedRounds
from qbatch.core.stored_json import OMITTED_IF_UNKNOWN, Stored, omitted_if_unknown, omitted_unless


@dataclass(frozen=True, slots=True, kw_only=True)
class Details(Stored):
    """The details of a result; ``docs/measurements.md`` explains each. ``protocol`` is the output of
    ``Protocol.to_json``; ``flags`` are conditions that made a GPU's figures unfair. ``more_texts``: the figures of the
    protocol's further texts, by name. ``not_measured``: of the parts (``MeasuredPart``) that were asked for, why those
    without figures have none. ``noise_inputs``: the inputs on which ``stats`` and ``memory`` were measured, where they
    are no text. ``incomplete``: whether something that was asked for is missing for a reason that may pass
    (``JobError.may_pass``), so that the result answers no later job. Of models of one shape in a batch, one is timed:
    its rows have a ``speed_key``, and those of the others name the job that theirs is of (``speed_from``)."""

    task: str | None = None
    versions: Mapping[str, str | None] | None = None
    size: Size = field(default_factory=Size)
    arithmetic_slowdown: Mapping[str, float] | None = omitted_if_unknown()
    perplexity: TextPerplexity = field(default_factory=TextPerplexity)
    quality: Quality = field(default_factory=Quality)
    more_texts: Mapping[str, FurtherText] | None = omitted_if_unknown()
    tasks: Mapping[str, TaskScores] | None = None
    tasks_reason: str | None = None
    not_measured: Mapping[str, str] | None = omitted_if_unknown()
    incomplete: bool | None = omitted_if_unknown()
    noise_inputs: str | None = omitted_if_unknown()
    protocol: Mapping[str, Any] | None = None
    protocol_hash: str | None = None
    memory: Memory = field(default_factory=Memory)
    shapes: RunShape = field(default_factory=RunShape)
    stats: Mapping[str, PhaseTimes] | None = None
    rounds: TimedRounds = field(default_factory=TimedRounds)
    flags: Mapping[str, bool] | None = None
    why: DecodeReasons = field(default_factory=DecodeReasons)
    audits: MeasuringAudit = field(default_factory=MeasuringAudit)
    checkpoint_key: str | None = omitted_if_unknown()
    base_key: str | None = omitted_if_unknown()
    fingerprint: str | None = omitted_if_unknown()
    commit: str | None = omitted_unless("fingerprint")
    device_uuid: str | None = omitted_unless("fingerprint")
    speed_key: str | None = omitted_if_unknown()
    speed_from: str | None = omitted_if_unknown()
    audit: CheckpointAudit = field(default_factory=CheckpointAudit, metadata=OMITTED_IF_UNKNOWN)

    @property
    def is_on_cpu(self) -> bool:
        """Whether the result was certainly measured on a CPU: the device's UUID is stored as null."""
        return self.device_uuid is None and "device_uuid" in self.stored

    def times(self, phase: Phase) -> PhaseTimes:
        return (self.stats or {}).get(phase, PhaseTimes())

    def by_round(self, phase: Phase) -> PhaseByRound:
        return (self.rounds.phases or {}).get(phase, PhaseByRound())
