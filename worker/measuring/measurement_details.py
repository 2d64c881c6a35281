"""What a measurement says of how it was made, and of what is missing from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qbatch.core.domain import Protocol
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.measurement import Measurement


def on_noise(row: Measurement, inputs: str) -> Measurement:
    """``row`` without the figures that are compared: the speed on noise is not the speed in use."""
    details = replace(row.details, noise_inputs=inputs)
    return replace(row, forward_s_p50=None, forward_samples_per_s=None, max_allocated_bytes=None, details=details)


def without_parts(row: Measurement, reasons: Mapping[MeasuredPart, str], *, may_pass: bool) -> Measurement:
    """``row`` with the ``reasons`` why parts are missing. ``may_pass``: whether another attempt may measure more."""
    stored = {part.value: reason for part, reason in reasons.items()}
    details = replace(row.details, not_measured=stored or None, incomplete=may_pass or None)
    return replace(row, details=details)


def under_protocol(measurement: Measurement, protocol: Protocol) -> Measurement:
    """``measurement`` with the protocol by which it was made."""
    details = replace(measurement.details, protocol=protocol.to_json(), protocol_hash=protocol.hash)
    return replace(measurement, details=details)
