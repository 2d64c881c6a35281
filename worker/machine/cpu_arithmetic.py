"""How much slower a CPU computes in 16 bits than in float32. Many emulate these types, and then a measured speed is
that of the emulation, not of the model.

``python -P -m`` this module measures in a process of its own, and prints JSON.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qbatch.core.domain import DType

# Large enough that the product, and not its call, is timed: 5 ms, and emulated a quarter of a second.
MATRIX_SIDE = 512
# CPU time, so a few products agree within some per cent, and one that is emulated is long enough alone.
_LEAST_S = 0.02
# The names that Linux gives them on x86 and on ARM. avx_ne_convert only converts.
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
# oneDNN's own, by which it does without what the processor has.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_16_BITS = (DType.BFLOAT16, DType.FLOAT16)


@functools.cache
def arithmetic_slowdown(dtype: DType) -> float | None:
    """How many times as long as in float32 a product of two matrices takes in ``dtype``, on one core of this CPU.

    Measured once in a process, in a tenth of a second, or a third where it is emulated. None for what has no 16 bits.
    """
    if dtype not in _16_BITS:
        return None
    return _product_s(dtype) / _product_s(DType.FLOAT32)


def arithmetic_slowdowns(device: str, dtypes: Iterable[DType]) -> dict[str, float] | None:
    """``arithmetic_slowdown`` of those of ``dtypes`` that have 16 bits, by name; None where ``device`` is no CPU."""
    if device != "cpu":
        return None
    found = {dtype.value: arithmetic_slowdown(dtype) for dtype in dtypes}
    return {name: slowdown for name, slowdown in found.items() if slowdown is not None}


def bfloat16_instructions(cpuinfo: str, environ: Mapping[str, str]) -> str | None:
    """The name of the processor's bfloat16 instructions, by ``cpuinfo``, the text of /proc/cpuinfo. None if it has
    none, does not say so, or ``environ`` may keep the library from using them."""
    if any(name in environ for name in _LIMITS):
        return None
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = {flag for name, _, value in lines if name.strip() in ("flags", "Features") for flag in value.split()}
    return next((name for name in _INSTRUCTIONS if name in flags), None)


def measured_apart() -> dict[str, float]:
    """``arithmetic_slowdown`` of each 16-bit dtype by its name, measured in another process, which a broken library may
    kill.

    Raises RuntimeError with the last line of that process's output.
    """
    # Where this module was loaded from is where it is found again, whatever the current directory holds.
    done = subprocess.run([sys.executable, "-P", "-m", __name__], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _product_s(dtype: DType) -> float:
    """The shortest time of as many products as take ``_LEAST_S``, in CPU time of one thread, so that other work on the
    machine does not count."""
    import torch

    matrix = torch.ones(MATRIX_SIDE, MATRIX_SIDE, dtype=getattr(torch, dtype.value))
    small = matrix[:32, :32].contiguous()
    with torch.inference_mode(), _one_thread():
        _time_s(small)  # what is loaded and compiled at the first time
        times_s: list[float] = []
        while sum(times_s) < _LEAST_S:
            times_s.append(_time_s(matrix))
    return min(times_s)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_s(matrix: Any) -> float:
    began = time.thread_time()
    matrix @ matrix
    return time.thread_time() - began


if __name__ == "__main__":
    print(json.dumps({dtype.value: arithmetic_slowdown(dtype) for dtype in _16_BITS}))  # noqa: T201
