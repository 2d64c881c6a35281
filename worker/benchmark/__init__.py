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
) -> Measurement:
    """Measure ``loaded``, fresh from ``folder``, by ``protocol``; ``scheme`` and ``dtype`` are resolved.

    ``on_step`` is told in a word or two what is being done. With the ``reference`` of its base (see
    ``worker.benchmark.reference``), ``details["quality"]`` says how far the model is from it. ``quantize_s`` is left
    to the caller. Raises BenchmarkError, Unsupported, CudaOom, HostOom, DeviceError or StorageError.
    """
    from worker.benchmark.measure import measure
    from worker.load import translated

    with translated(BenchmarkError, f"cannot measure {folder.name}"):
        return measure(
            loaded,
            folder=folder,
            scheme=scheme,
            dtype=dtype,
            protocol=protocol,
            eval_text=eval_text,
            on_step=on_step,
            reference=reference,
        )
