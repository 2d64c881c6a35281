"""Why a decode step takes as long as it does, in a word."""

from __future__ import annotations

from qbatch.core.measured.decode_figures import Verdict
from qbatch.worker.measuring.why.profile import StepProfile
from qbatch.worker.measuring.why.roofs import Roofs
from qbatch.worker.measuring.why.traffic import StepWork

# Under this share of the wall time at work, the device mostly waits for the host.
_BUSY_SHARE = 0.7
# From this share of a roof on, the roof is what limits.
_ROOF_SHARE = 0.6
# ``generate`` itself waits once or twice in a step, however small the model; a method's path for outliers 256 times in
# the thousands of launches of an 8B model. So both: more than ``generate`` ever does, and often for the work at hand.
_SYNCHRONIZATIONS = 16
_SYNCHRONIZATIONS_PER_LAUNCH = 0.01


def judge(
    *, wall_s: float, profile: StepProfile, work: StepWork, roofs: Roofs, cache_size_bytes: int
) -> Verdict | None:
    """The verdict on a step of ``wall_s`` seconds; None where the weights fit in the device's cache of
    ``cache_size_bytes``, since the copy roof then says nothing."""
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
