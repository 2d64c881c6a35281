"""Latency, memory, size and quality of a loaded model. Importing this package does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from models_db.domain import DType, Measurement, Protocol, Scheme
from models_db.errors import BenchmarkError

if TYPE_CHECKING:
    from worker.benchmark.reference import Reference
    from worker.load import Loaded

DEFAULT_EVAL_TEXT = Path(__file__).with_name("eval_text.txt")


def benchmark(
    loaded: Loaded,
    *,
    folder: Path,
    scheme: Scheme,
    dtype: DType,
    protocol: Protocol,
    eval_text: str,
    on_step: Callable[[str], None],
    reference: Reference | None = None,
    explain: bool = False,
) -> Measurement:
    """Measure ``loaded``, fresh from ``folder``, by ``protocol``; ``scheme`` and ``dtype`` are resolved.

    ``on_step`` is told in a word or two what is being done. With the ``reference`` of its base (see
    ``worker.benchmark.reference``), ``details["quality"]`` says how far the model is from it. With ``explain``,
    ``details["why"]`` of a causal LM on a GPU says what limits it and what energy it takes; that is about a minute
    more. ``quantize_s`` is left to the caller. Raises BenchmarkError, Unsupported, CudaOom, HostOom, DeviceError,
    StorageError.
    """
    from worker.benchmark.measure import Plan, measure
    from worker.load import translated

    plan = Plan(
        loaded=loaded,
        folder=folder,
        dtype=dtype,
        compute_dtype=scheme.resolved(dtype).compute_dtype,
        protocol=protocol,
        eval_text=eval_text,
        on_step=on_step,
        reference=reference,
        explain=explain,
    )
    with translated(BenchmarkError, f"cannot measure {folder.name}"):
        return measure(plan)
