"""Recognize errors of torch, bitsandbytes or NumPy that mean a lack of memory or a fault of the device."""

from __future__ import annotations

import errno

from qbatch.core.errors import CudaOom, DeviceError, HostOom, JobError, ModelFault

# Not every error that mentions CUDA is a fault: two tensors on different devices are a programming error.
_DEVICE_FAULTS = ("CUDA error", "CUDA driver", "CUBLAS_STATUS", "CUDNN_STATUS", "illegal memory access")
# Errors that a model causes on a healthy device, because it asks for something impossible. They recur on any device.
_MODEL_FAULTS = ("device-side assert", "CUBLAS_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_INVALID_VALUE")
_OOM_SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def device_fault(error: BaseException) -> type[JobError] | None:
    """The class that ``error`` belongs to: HostOom, CudaOom, DeviceError or its subclass ModelFault; else None.

    Libraries may wrap the fault: transformers reports one during an import as a missing module.
    """
    if isinstance(error, JobError):
        return None
    kind = _kind(error)
    return kind if kind is not None or error.__cause__ is None else device_fault(error.__cause__)


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
