"""Which errors of torch, bitsandbytes or NumPy mean that memory ran out, or that the device failed, and why it did."""

from __future__ import annotations

import errno

from qbatch.core.errors import CudaOom, DeviceError, HostOom, JobError, ModelFault

# Not every error that speaks of CUDA: two tensors on different devices are a mistake, not a fault.
_DEVICE_FAULTS = ("CUDA error", "CUDA driver", "CUBLAS_STATUS", "CUDNN_STATUS", "illegal memory access")
# What a sound device does with a model that asks for what cannot be: on the next one it would do the same.
_MODEL_FAULTS = ("device-side assert", "CUBLAS_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_INVALID_VALUE")
_OOM_SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def device_fault(error: BaseException) -> type[JobError] | None:
    """HostOom, CudaOom, DeviceError or its ModelFault, where ``error`` is one."""
    import torch

    if isinstance(error, JobError):
        return None
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
