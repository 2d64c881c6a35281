"""Recognize errors of torch, bitsandbytes or NumPy that mean a lack of memory or a fault of the device."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from qbatch.core.errors import CudaOom, DeviceError, HostOom, JobError, ModelFault

# Not every error that mentions CUDA is a fault: two tensors on different devices are a programming error.
_DEVICE_FAULTS = ("CUDA error", "CUDA driver", "CUBLAS_STATUS", "CUDNN_STATUS", "illegal memory access")
# Errors that a model causes on a healthy device, because it asks for something impossible. They recur on any device.
_MODEL_FAULTS = ("device-side assert", "CUBLAS_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_INVALID_VALUE")
_OOM_SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFault:
    """A fault of the device or of memory: the class of the JobError, and the error that shows it."""

    kind: type[JobError]
    error: BaseException


def device_fault(error: BaseException) -> type[JobError] | None:
    """The class of the fault behind ``error``: HostOom, CudaOom, DeviceError or its subclass ModelFault; else None."""
    fault = find_fault(error)
    return None if fault is None else fault.kind


def find_fault(error: BaseException) -> DeviceFault | None:
    """The fault behind ``error``, which a library may have wrapped: transformers reports a device that fails during an
    import as a missing module."""
    if isinstance(error, JobError):
        return None
    if (kind := _kind(error)) is not None:
        return DeviceFault(kind=kind, error=error)
    return None if error.__cause__ is None else find_fault(error.__cause__)


def _kind(error: BaseException) -> type[JobError] | None:
    import torch

    text = str(error)
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or no_memory or "can't allocate memory" in text:
        return HostOom
    if isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in _OOM_SIGNS):
        return CudaOom
    if any(sign in text for sign in _MODEL_FAULTS):
        return ModelFault
    if isinstance(error, torch.AcceleratorError) or any(sign in text for sign in _DEVICE_FAULTS):
        return DeviceError
    return None
