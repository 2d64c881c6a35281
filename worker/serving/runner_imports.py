"""Imported by the forkserver: everything that a runner imports and that does not initialise CUDA.

So their 15 s are paid once for a worker. bitsandbytes asks at import which GPU there is, so it is left to the runners.
"""

from qbatch.worker.machine.imports import MODEL_LIBRARIES, import_without_gpu

NAMES = (
    *MODEL_LIBRARIES,
    # Imported by the first model of any family.
    "transformers.modeling_layers",
    "transformers.generation.utils",
    "qbatch.worker.quantizing.streaming.stream",
    "qbatch.worker.measuring.row_benchmark",
    "qbatch.worker.runner.measured_rounds",
    "qbatch.worker.runner.process",
    "qbatch.worker.runner.fetch_ahead",
    "qbatch.worker.runner.entry_points",
)

import_without_gpu(NAMES)
