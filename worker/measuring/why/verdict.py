"""Decide what limits the speed of a decode step."""

from __future__ import annotations

from qbatch.core.measured.decode_figures import Verdict
from qbatch.worker.measuring.why.profile import StepProfile
from qbatch.worker.measuring.why.roofs import Roofs
from qbatch.worker.measuring.why.traffic import StepWork

# If the device is busy for less than this share of the wall time, it mostly waits for the host.
_BUSY_SHARE = 0.7
# From this share of a roof on, the roof counts as the limit.
_ROOF_SHARE = 0.6
# ``generate`` itself synchronizes once or twice in a step, however small the model. A method's outlier path does so 226
# times in the 2887 launches of an 8B model. So both must hold: more than ``generate`` does, and often per launch.
_SYNCHRONIZATIONS = 16
_SYNCHRONIZATIONS_PER_LAUNCH = 0.01


def judge(
    *, wall_s: float, profile: StepProfile, work: StepWork, roofs: Roofs, cache_size_bytes: int
) -> Verdict | None:
    """The verdict on a step of ``wall_s`` seconds.

    None if the weights fit in the device's cache of ``cache_size_bytes``, to which the copy roof does not apply.
    """
    if work.weight_bytes <= cache_size_bytes:
        return None
    if profile.device_busy_s < _BUSY_SHARE * wall_s:
        waits = profile.synchronizations >= max(_SYNCHRONIZATIONS, _SYNCHRONIZATIONS_PER_LAUNCH * profile.launches)
        return Verdict.SYNCHRONIZATION_BOUND if waits else Verdict.HOST_BOUND
    if work.bytes / profile.device_busy_s >= _ROOF_SHARE * roofs.copy_bytes_per_s:
        return Verdict.MEMORY_BOUND
    if work.flops / profile.device_busy_s >= _ROOF_SHARE * roofs.matmul_flops_per_s:
        return Verdict.COMPUTE_BOUND
    return Verdict.KERNEL_BOUND
