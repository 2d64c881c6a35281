"""Imported by the forkserver: everything that a runner imports and that does not initialise CUDA.

So their 15 s are paid once for a worker.
"""

from qbatch.worker.machine.imports import MODEL_LIBRARIES, import_without_gpu

NAMES = (*MODEL_LIBRARIES, "qbatch.worker.runner.process")

import_without_gpu(NAMES)
