"""What is measured, and how; and the measurement of its size alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from qbatch.core.domain import DType, Protocol
from qbatch.core.errors import BenchmarkError
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import Measurement
from qbatch.core.measured.speed_figures import Size
from qbatch.worker.measuring.speed.size import ModelSize, adapter_disk_bytes, disk_bytes
from qbatch.worker.models.load import translated


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model in ``folder``, perhaps with the ``adapter`` in another, and how it is measured.

    ``dtype`` and ``compute_dtype`` are resolved. Of ``protocol`` only fields that do not depend on the shape are used.
    ``texts``: its further texts and packed tasks by their sha256. ``on_step``: called with the name of each step.
    """

    folder: Path
    dtype: DType
    compute_dtype: DType
    protocol: Protocol
    eval_text: str
    texts: Mapping[str, str]
    on_step: Callable[[str], None]
    adapter: Path | None = None

    def errors(self) -> AbstractContextManager[None]:
        return translated(BenchmarkError, f"cannot measure {self.folder.name}")


def with_size(subject: Subject, size: ModelSize, *, device_name: str, details: Details) -> Measurement:
    """The measurement of ``subject``, of which nothing but the ``size`` is known yet."""
    return Measurement(
        device_name=device_name,
        dtype=subject.dtype,
        compute_dtype=subject.compute_dtype,
        num_parameters=size.num_parameters,
        quantized_fraction=size.quantized_fraction,
        bits_per_param=size.bits_per_param,
        disk_bytes=disk_bytes(subject.folder) + adapter_disk_bytes(subject.adapter),
        memory_footprint_bytes=size.memory_footprint_bytes,
        weights_bytes=size.weights_bytes,
        details=details,
    )


def stored_size(size: ModelSize) -> Size:
    return Size(
        num_parameters=size.num_parameters,
        quantized_parameters=size.quantized_parameters,
        weights_bytes=size.weights_bytes,
        quant_state_bytes=size.quant_state_bytes,
        buffer_bytes=size.buffer_bytes,
        memory_footprint_bytes=size.memory_footprint_bytes,
    )
