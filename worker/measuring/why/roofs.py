"""The device's best rates of copying and of arithmetic, the roofs that no kernel exceeds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qbatch.core.byte_units import GIB
from qbatch.worker.measuring.speed.device_clock import CudaClock
from qbatch.worker.measuring.stats import percentile

_COPIED_BYTES = GIB
_MATRIX_SIDE = 8192
_REPETITIONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofs:
    """``copy_bytes_per_s``: bytes read plus bytes written by a copy. ``matmul_flops_per_s``: of a large square matrix
    product in ``dtype``."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    dtype: str


@functools.cache
def measure_roofs(device: str, dtype: torch.dtype) -> Roofs:
    """Measure medians on a CUDA device, once per process. Briefly uses 2 GiB, then two matrices of 8192²."""
    roofs = Roofs(
        copy_bytes_per_s=2 * _COPIED_BYTES / _copy_s(device),
        matmul_flops_per_s=2 * _MATRIX_SIDE**3 / _matmul_s(device, dtype),
        dtype=str(dtype).removeprefix("torch."),
    )
    torch.cuda.empty_cache()
    return roofs


def _copy_s(device: str) -> float:
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _median_s(lambda: target.copy_(source), device)


def _matmul_s(device: str, dtype: torch.dtype) -> float:
    matrix = torch.randn(_MATRIX_SIDE, _MATRIX_SIDE, device=device, dtype=dtype)
    product = torch.empty_like(matrix)
    return _median_s(lambda: torch.mm(matrix, matrix, out=product), device)


def _median_s(run: Callable[[], object], device: str) -> float:
    clock = CudaClock(device)
    for _ in range(3):
        run()
    clock.synchronize()
    marks = [clock.mark()]
    for _ in range(_REPETITIONS):
        run()
        marks.append(clock.mark())
    return percentile(sorted(clock.intervals_s(marks)), 50)
