"""The analysis of decode steps on a GPU: what limits their speed, and the energy that they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from qbatch.core.stored_json import Stored, omitted_if_unknown, omitted_unless, when_known


class Verdict(StrEnum):
    """The bottleneck of a decode step: what would have to be faster to make the step faster."""

    HOST_BOUND = "host-bound"
    SYNCHRONIZATION_BOUND = "synchronization-bound"
    MEMORY_BOUND = "memory-bound"
    COMPUTE_BOUND = "compute-bound"
    KERNEL_BOUND = "kernel-bound"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledStep(Stored):
    """A decode step under the profiler: averages over ``steps`` steps."""

    steps: int | None = None
    device_busy_s: float | None = None
    launches: float | None = None
    synchronizations: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadByStep(Stored):
    """The bytes that a decode step must read, and the operations that it must compute, for the whole batch."""

    weight_bytes: int | None = None
    cache_bytes: int | None = None
    flops: float | None = None

    @property
    def bytes(self) -> int:
        return (self.weight_bytes or 0) + (self.cache_bytes or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRoofs(Stored):
    """The rates that a plain copy and a large matrix product in ``dtype`` reach on the device."""

    copy_bytes_per_s: float | None = None
    matmul_flops_per_s: float | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAlone(Stored):
    """The time of a decode step's kernels without the host, in seconds per step, or the reason if it is missing."""

    step_s: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEnergy(Stored):
    """The energy of one call in joules: ``gross_j`` from the counter, ``net_j`` without the idle energy of the same
    time."""

    gross_j: float | None = None
    net_j: float | None = None
    uncertainty_j: float | None = None
    repetitions: int | None = omitted_if_unknown()
    seconds: float | None = omitted_if_unknown()
    gross_j_per_token: float | None = omitted_if_unknown()
    net_j_per_token: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredEnergy(Stored):
    """The energy of prefill and decoding. ``flags``: conditions that made the measurement unfair; ``reason``: why there
    is none; ``idle_w``: the idle power in watts."""

    reason: str | None = omitted_if_unknown()
    idle_w: float | None = omitted_if_unknown()
    prefill: PhaseEnergy = field(default_factory=PhaseEnergy, metadata=when_known("idle_w"))
    decode: PhaseEnergy = field(default_factory=PhaseEnergy, metadata=when_known("idle_w"))
    flags: Mapping[str, bool] | None = omitted_unless("idle_w")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeReasons(Stored):
    """The verdict on an eager decode step of ``step_wall_s`` seconds, and the figures that it is based on. ``verdict``
    is the value of a ``Verdict``, or one that only newer code knows."""

    verdict: str | None = None
    reason: str | None = None
    profile: ProfiledStep = field(default_factory=ProfiledStep)
    busy_share: float | None = None
    work: ReadByStep = field(default_factory=ReadByStep)
    bytes_per_s: float | None = omitted_unless("profile")
    step_wall_s: float | None = None
    roofs: DeviceRoofs = field(default_factory=DeviceRoofs)
    kernels_alone: StepAlone = field(default_factory=StepAlone)
    energy: MeasuredEnergy = field(default_factory=MeasuredEnergy)
