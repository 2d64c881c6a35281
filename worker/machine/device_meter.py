"""Asks the driver, or the kernel, how full and how busy a worker's device is."""

from __future__ import annotations

import psutil
import pynvml

from qbatch.core.device_load import DeviceLoad
from qbatch.worker.machine.gpu import nvml


def read_load(uuid: str | None) -> DeviceLoad:
    """The load of the GPU with this UUID, or of the CPU and the host's memory. It takes no time from what runs there.

    For a CPU, the share is that of the time since the last call, so the first one says nothing.
    """
    return _load_of_cpu() if uuid is None else _load_of_gpu(uuid)


def _load_of_cpu() -> DeviceLoad:
    memory = psutil.virtual_memory()
    return DeviceLoad(used_bytes=memory.total - memory.available, busy_share=psutil.cpu_percent() / 100)


def _load_of_gpu(uuid: str) -> DeviceLoad:
    try:
        with nvml():
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            return DeviceLoad(
                used_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).used), busy_share=_busy_share(handle)
            )
    except pynvml.NVMLError:
        # A GPU that does not answer is noticed by those who use it, and they say so.
        return DeviceLoad()


def _busy_share(handle: object) -> float | None:
    try:
        return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except pynvml.NVMLError:  # a part of a GPU (MIG) has memory of its own, but no such figure
        return None
