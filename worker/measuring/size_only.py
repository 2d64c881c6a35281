"""Measures the size of a model that is not loaded."""

from __future__ import annotations

from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import Measurement
from qbatch.worker.measuring.measurement_details import under_protocol
from qbatch.worker.measuring.subject import Subject, stored_size, with_size
from qbatch.worker.measuring.unloaded_size import count_unloaded
from qbatch.worker.measuring.versions import versions


def measure_size_only(subject: Subject, *, trusted: bool) -> Measurement:
    """The figures of a model that is not loaded: its size. Raises SourceCorrupt, UnsafeSource or Unsupported."""
    unloaded = count_unloaded(subject.folder, subject.dtype, trusted=trusted, adapter=subject.adapter)
    return under_protocol(
        with_size(
            subject,
            unloaded.size,
            device_name="",
            details=Details(
                task=unloaded.kind.value, versions=versions(*unloaded.libraries), size=stored_size(unloaded.size)
            ),
        ),
        subject.protocol,
    )
