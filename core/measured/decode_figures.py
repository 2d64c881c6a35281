"""Why decoding is as fast as it is, and what it costs in energy: what is known of a GPU's decode steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from qbatch.core.measured.stored_json import Stored, beside, left_out, written_beside


class Verdict(StrEnum):
    """What would have to become faster for a decode step to become faster."""

    HOST_BOUND = "host-bound"
    SYNCHRONIZATION_BOUND = "synchronization-bound"
    MEMORY_BOUND = "memory-bound"
    COMPUTE_BOUND = "compute-bound"
    KERNEL_BOUND = "kernel-bound"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledStep(Stored):
    """A decode step under the profiler, on average over ``steps``."""

    steps: int | None = None
    device_busy_s: float | None = None
    launches: float | None = None
    synchronizations: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadByStep(Stored):
    """What a decode step must read and compute, for the whole batch."""

    weight_bytes: int | None = None
    cache_bytes: int | None = None
    flops: float | None = None

    @property
    def bytes(self) -> int:
        return (self.weight_bytes or 0) + (self.cache_bytes or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRoofs(Stored):
    """What a plain copy and a large matrix product of ``dtype`` reach on the device."""

    copy_bytes_per_s: float | None = None
    matmul_flops_per_s: float | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAlone(Stored):
    """A decode step's kernels without the host: seconds a step, else why it could not be timed."""

    step_s: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEnergy(Stored):
    """Joules of one call: as the counter has it, and less what idling takes for as long."""

    gross_j: float | None = None
    net_j: float | None = None
    uncertainty_j: float | None = None
    repetitions: int | None = left_out()
    seconds: float | None = left_out()
    gross_j_per_token: float | None = left_out()
    net_j_per_token: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredEnergy(Stored):
    """``flags``: what made it unfair; ``reason``: why there is none."""

    reason: str | None = left_out()
    idle_w: float | None = left_out()
    prefill: PhaseEnergy = field(default_factory=PhaseEnergy, metadata=written_beside("idle_w"))
    decode: PhaseEnergy = field(default_factory=PhaseEnergy, metadata=written_beside("idle_w"))
    flags: Mapping[str, bool] | None = beside("idle_w")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeReasons(Stored):
    """The verdict on an eager decode step of ``step_wall_s`` seconds, and what it rests on. ``verdict``: a ``Verdict``,
    or what newer code calls one."""

    verdict: str | None = None
    reason: str | None = None
    profile: ProfiledStep = field(default_factory=ProfiledStep)
    busy_share: float | None = None
    work: ReadByStep = field(default_factory=ReadByStep)
    bytes_per_s: float | None = beside("profile")
    step_wall_s: float | None = None
    roofs: DeviceRoofs = field(default_factory=DeviceRoofs)
    kernels_alone: StepAlone = field(default_factory=StepAlone)
    energy: MeasuredEnergy = field(default_factory=MeasuredEnergy)
