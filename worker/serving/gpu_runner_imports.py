"""Imported by the forkserver of a GPU's worker: what bitsandbytes imports of torch where there is a GPU."""

from qbatch.worker.machine.imports import COMPILER, import_without_gpu

import_without_gpu(COMPILER)
