"""A loaded model measured by itself, for tests: qbatch measures it in turns with the others of its bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from qbatch.core.domain import DType, Protocol, Scheme
from qbatch.core.measured.measurement import Measurement
from qbatch.worker.measuring.model_benchmark import ModelBenchmark
from qbatch.worker.measuring.quality.reference import Reference
from qbatch.worker.measuring.row_benchmark import RowBenchmark
from qbatch.worker.measuring.subject import Subject
from qbatch.worker.measuring.why.capture import Captures
from qbatch.worker.models.load import LoadedModel


def benchmark(
    loaded: LoadedModel,
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
    ``reference`` of its base (see ``measuring.quality.reference``), ``details.quality`` says how far the model is
    from it. ``task_texts`` are the protocol's packed tasks by their sha256. ``quantize_s`` is left to the caller.
    Raises BenchmarkError, Unsupported, UnsafeSource, FetchError, CudaOom, HostOom, DeviceError, StorageError.
    """

    compute_dtype = scheme.resolved(dtype).compute_dtype
    model = ModelBenchmark(
        Subject(
            folder=folder,
            dtype=dtype,
            compute_dtype=compute_dtype,
            protocol=protocol,
            eval_text=eval_text,
            texts=task_texts or {},
            on_step=on_step,
        )
    )
    row = RowBenchmark(model, protocol, on_step)
    model.prepare(loaded)
    for _ in range(protocol.rounds):
        row.time(loaded)
    model.measure_quality(loaded, reference)
    row.observe(loaded)
    kernels = None
    if (shape := row.captured_shape) is not None:
        on_step("kernels")
        with Captures() as captures:
            ((kernels,),) = captures.kernels([model.kernels_request([shape], device=loaded.device)])
    return row.measurement(kernels=kernels, interleaved_with=())
