"""Imported by the forkserver: everything that a runner imports and that does not initialise CUDA.

So their 15 s are paid once for a worker. bitsandbytes initialises CUDA, however it is imported, and stays out.
"""

from qbatch.worker.machine.imports import import_without_gpu

NAMES = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "accelerate",
    "qbatch.worker.runner.process",
)

import_without_gpu(NAMES)
