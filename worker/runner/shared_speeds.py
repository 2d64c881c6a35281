"""Which rows may take the speed of another model of the same shape, and which must not.

Speed, peaks of memory and what limits decoding depend on shape, scheme, protocol, device and software. On the values of
weights they depend where a method or a model looks at them, and where the power that they take lowers the clocks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

from qbatch.core.domain import DeviceKind, content_hash
from qbatch.core.errors import SourceCorrupt
from qbatch.core.identity import Settled
from qbatch.core.measured.details import Details
from qbatch.core.measured.known_speed import KnownSpeed
from qbatch.core.methods.registry import every_library
from qbatch.core.model_shape import shape_of
from qbatch.worker.runner.checkpoint_jobs import MeasuredModel
from qbatch.worker.sources.fetch import LocalSource

log = logging.getLogger("qbatch.runner")

# What must agree before the figures of one model are those of another. Whether two tensors are tied depends on their
# values, so equal headers are not enough.
_COUNTS = ("num_parameters", "quantized_parameters")


class SpeedKeys:
    """The keys by which rows of ``source`` share their speed on the GPU with that UUID; on a CPU there are none."""

    def __init__(self, source: LocalSource, device_uuid: str | None) -> None:
        self._source = source
        self._device_uuid = device_uuid

    @cached_property
    def _shape(self) -> str | None:
        """The shape of the source; None if no row may share its speed. Computed only when needed, because headers may
        be long."""
        return None if self._device_uuid is None or self._source.runs_code else _shape_of(self._source)

    @cached_property
    def _software(self) -> Mapping[str, str | None]:
        from qbatch.worker.measuring.versions import versions

        return versions(*every_library())

    def of(self, settled: Settled) -> str | None:
        """The key of the row's speed; None if the row must be timed by itself."""
        protocol, scheme = settled.protocol, settled.scheme
        if not protocol.speed or protocol.energy or not protocol.share_speed:
            return None
        if scheme.description.speed_depends_on_values(scheme.options) or self._shape is None:
            return None
        return content_hash(
            {
                "shape": self._shape,
                "dtype": settled.dtype,
                "protocol": protocol.hash,
                "device": self._device_uuid,
                "software": self._software,
            }
        )


def _shape_of(source: LocalSource) -> str | None:
    try:
        return shape_of(source.folder)
    except SourceCorrupt as error:  # of a file that is not needed for all that is done with the model
        log.warning("%s: the model is timed by itself", error)
        return None


def may_be_shared(details: Details, device_kind: DeviceKind) -> bool:
    """Whether a timed row's speed can be that of others. Not if the GPU's clocks were lowered, or may have been."""
    if details.flags is None:
        return device_kind is not DeviceKind.CUDA
    return not any(details.flags.values())


def agreeing(speeds: Mapping[int, KnownSpeed], models: Sequence[MeasuredModel]) -> dict[int, KnownSpeed]:
    """The ``speeds`` (by job id) whose models have the same number of parameters. If one of a set differs, the whole
    set is dropped.

    What is counted is in the audits of checkpoints, so a set without a checkpoint is dropped too.
    """
    plans = [(plan, model) for model in models for plan in model.plans if plan.job_id in speeds]
    compared = [
        (plan.speed_key, _same_counts(speeds[plan.job_id], model))
        for plan, model in plans
        if model.published is not None
    ]
    agreed = {key for key, _ in compared} - {key for key, is_same in compared if not is_same}
    return {plan.job_id: speeds[plan.job_id] for plan, _ in plans if plan.speed_key in agreed}


def _same_counts(known: KnownSpeed, model: MeasuredModel) -> bool:
    own = model.audit or {}
    other = known.figures.details.audit
    return all(own.get(name) is not None and own.get(name) == getattr(other, name) for name in _COUNTS)
