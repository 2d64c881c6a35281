"""Describes this worker for its row in the database: its device, its process, and where that runs."""

from __future__ import annotations

import os
import secrets
import socket

import psutil

from qbatch.core.domain import DeviceKind
from qbatch.core.errors import NoSuchDevice
from qbatch.models_db.workers import WorkerInfo
from qbatch.worker.machine.gpu import installed_gpus
from qbatch.worker.machine.pid_space import pid_space
from qbatch.worker.machine.processor import processor_name


def describe_worker(uuid: str | None) -> WorkerInfo:
    """Describe this worker for its row in the database. Raises NoSuchDevice if there is no such GPU."""
    host = socket.gethostname()
    # Containers that share a host name may have equal pids, and the name must be unique: it holds the lease of the GPU.
    suffix = secrets.token_hex(2)
    common = {"host": host, "pid": os.getpid(), "pid_space": pid_space()}
    if uuid is None:
        return WorkerInfo(
            name=f"cpu-{os.getpid()}-{suffix}@{host}",
            device_kind=DeviceKind.CPU,
            device_name=cpu_name(),
            device_uuid=None,
            memory_bytes=psutil.virtual_memory().total,
            **common,  # type: ignore[arg-type]
        )
    gpu = next((gpu for gpu in installed_gpus() if gpu.uuid == uuid), None)
    if gpu is None:
        raise NoSuchDevice(f"this machine has no GPU with the UUID {uuid}")
    return WorkerInfo(
        name=f"gpu{gpu.index}-{os.getpid()}-{suffix}@{host}",
        device_kind=DeviceKind.CUDA,
        device_name=gpu.name,
        device_uuid=gpu.uuid,
        memory_bytes=gpu.memory_bytes,
        **common,  # type: ignore[arg-type]
    )


def cpu_name() -> str:
    """The name of the processor and the number of usable cores, both of which decide its speed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()} ({cores} cores)"
