"""The software versions and the device of a measurement."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

import torch

from qbatch.core.methods.registry import required_libraries
from qbatch.worker.machine.processor import processor_name

_PACKAGES = ("qbatch", "torch", "transformers", *required_libraries(), "accelerate", "safetensors", "lm_eval")


def versions(*libraries: str) -> dict[str, str | None]:
    """The versions of qbatch's packages, the given ``libraries``, Python, CUDA and the NVIDIA driver.

    None for whatever is not installed.
    """
    return {name: _package(name) for name in (*_PACKAGES, *libraries)} | {
        # The package's metadata may lack the build (+cpu, +cu130).
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def device_name(device: str) -> str:
    """The name of the GPU, or of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return processor_name()


@cache
def _package(name: str) -> str | None:
    # Remembered: each look reads a file of metadata, for every row. What is imported stays what it is.
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
