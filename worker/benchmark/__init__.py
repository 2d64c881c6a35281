"""Latency, memory, size and quality of a loaded model. Importing this package does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from models_db.domain import DType, Measurement, Protocol, Scheme

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
    task_texts: Mapping[str, str] | None = None,
) -> Measurement:
    """Measure ``loaded``, fresh from ``folder``, by ``protocol``, by itself: all rounds in a row, nothing between them.

    ``scheme`` and ``dtype`` are resolved. ``on_step`` is told in a word or two what is being done. With the
    ``reference`` of its base (see ``worker.benchmark.reference``), ``details["quality"]`` says how far the model is
    from it. ``task_texts`` are the protocol's packed tasks by their sha256. ``quantize_s`` is left to the caller.
    Raises BenchmarkError, Unsupported, UnsafeSource, FetchError, CudaOom, HostOom, DeviceError, StorageError.
    """
    from worker.benchmark.capture import Captures
    from worker.benchmark.graph import KernelsRequest
    from worker.benchmark.measure import ModelBenchmark, RowBenchmark, Subject

    compute_dtype = scheme.resolved(dtype).compute_dtype
    model = ModelBenchmark(
        Subject(
            folder=folder,
            dtype=dtype,
            compute_dtype=compute_dtype,
            protocol=protocol,
            eval_text=eval_text,
            task_texts=task_texts or {},
            on_step=on_step,
        )
    )
    row = RowBenchmark(model, protocol, on_step)
    model.begin(loaded)
    for _ in range(protocol.rounds):
        row.time(loaded)
    model.judge(loaded, reference)
    row.observe(loaded)
    kernels = None
    if (shape := row.captured_shape) is not None:
        on_step("kernels")
        request = KernelsRequest(folder=str(folder), dtype=dtype.value, device=loaded.device, shapes=(shape,))
        with Captures() as captures:
            kernels = captures.kernels(request)[0]
    return row.measurement(kernels=kernels, interleaved_with=())
