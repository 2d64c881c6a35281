"""Imported by the forkserver of a CPU's worker: what a GPU's leaves to its runners, since it initialises CUDA."""

import logging

from qbatch.worker.machine.imports import no_garbage_collection
from qbatch.worker.methods.implementations import import_usual_library

try:
    with no_garbage_collection():
        import_usual_library()
except Exception:
    # Each job meets this error again and reports it. Here it would end the forkserver, and with it the worker.
    logging.getLogger("qbatch.worker").exception("importing bitsandbytes")
